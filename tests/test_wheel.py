"""The built wheel holds exactly the five packages, and runs outside the checkout."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("eval", "export", "lowbit", "ptq", "qat")


def test_the_wheel_has_the_five_packages_and_every_module(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (*PACKAGES, "setup.cfg", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top,) = [name for name in names if name.endswith("top_level.txt")]
        assert sorted(archive.read(top).decode().split()) == sorted(PACKAGES)
        archive.extractall(tmp_path / "installed")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    code = "import lowbit.kernels, lowbit.data.pipeline; print(lowbit.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path / "installed",
    )
    assert str(tmp_path) in done.stdout
