"""Debian packages in a folder of their own: what is unpacked, what is refused, what is left behind."""

import json
import os
import shutil
import subprocess

import pytest

from lowbit.devices import cache, debian

# One small package without dependencies but Debian's C library: 3.7 MB in all.
PACKAGE = "hello"


def host_state():
    """Returns the times of what the host's apt and dpkg keep."""
    paths = ("/var/lib/dpkg/status", "/var/lib/apt/lists", "/var/cache/apt", "/etc/apt")
    return {path: os.stat(path).st_mtime_ns for path in paths if os.path.exists(path)}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Returns the folder of PACKAGE and its versions.

    Skips, by name, where packages of Debian cannot be had at all; in CI that is a failure.
    """
    folder = tmp_path_factory.mktemp("debian") / "root"
    try:
        return folder, debian.unpack([PACKAGE], folder)
    except debian.DebianError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO DEBIAN PACKAGES HERE: {error}")


@pytest.mark.slow
def test_a_package_runs_on_its_own_libraries_and_the_host_is_as_it_was(unpacked, tmp_path):
    folder, versions = unpacked
    assert {PACKAGE, "libc6"} <= set(versions)
    before = host_state()
    arm = debian.unpack([PACKAGE], tmp_path / "arm", "arm64")
    assert host_state() == before
    assert arm[PACKAGE] == versions[PACKAGE]
    loader = folder / "lib64/ld-linux-x86-64.so.2"  # lib64 is still a link into usr
    assert (folder / "lib64").is_symlink() and (folder / "lib").is_symlink()
    libraries = folder / "usr/lib/x86_64-linux-gnu"
    command = [loader, "--library-path", libraries, folder / "usr/bin/hello"]
    said = subprocess.run(command, capture_output=True, check=True, env={"LC_ALL": "C"})
    assert said.stdout == b"Hello, world!\n"
    header = (tmp_path / "arm/usr/bin/hello").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18:20] == b"\xb7\0"  # EM_AARCH64
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["root"]
    assert not (folder / "apt").exists()


@pytest.mark.slow
def test_it_is_unpacked_once_and_anew_where_the_stamp_is_of_other_packages(unpacked, monkeypatch):
    folder, versions = unpacked
    monkeypatch.setattr(debian, "_apt", None)  # a second time would need it
    assert debian.unpack([PACKAGE], folder) == versions
    with pytest.raises(TypeError):
        debian.unpack([PACKAGE, "hello-traditional"], folder)
    assert debian.unpack([PACKAGE], folder) == versions  # a failed call leaves the earlier folder
    assert not (folder.with_name(".root.building")).exists()


@pytest.mark.slow
def test_what_a_killed_call_left_is_not_taken_for_finished(unpacked, tmp_path):
    folder, versions = unpacked
    left = tmp_path / ".root.building"
    shutil.copytree(folder, left, symlinks=True)
    (left / "rubbish").touch()
    assert debian.unpack([PACKAGE], tmp_path / "root") == versions
    assert not left.exists() and not (tmp_path / "root/rubbish").exists()
    assert json.loads((tmp_path / "root" / cache.STAMP).read_text())["facts"] == versions


def test_what_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty"):
        debian.unpack([PACKAGE], tmp_path)
    assert (tmp_path / "file").exists()


@pytest.mark.slow
def test_an_unknown_package_and_an_unknown_version_are_named(unpacked, tmp_path):
    with pytest.raises(debian.DebianError, match="Unable to locate package lowbit-unheard-of"):
        debian.unpack(["lowbit-unheard-of"], tmp_path / "root")
    with pytest.raises(debian.DebianError, match="Version '0.1' for 'hello' was not found"):
        debian.unpack(["hello=0.1"], tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == [".root.lock"]


@pytest.mark.slow
def test_without_a_network_the_mirror_is_named(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(debian, "host_mirror", lambda: "http://127.0.0.1:9/debian")
    with pytest.raises(debian.DebianError, match="the list of packages: apt fails: .*127.0.0.1"):
        debian.unpack([PACKAGE], tmp_path / "root")


@pytest.mark.slow
def test_another_distribution_and_a_host_without_apt_are_named(unpacked, tmp_path, monkeypatch):
    sources = tmp_path / "sources.list"
    sources.write_text("deb http://archive.example/ubuntu noble main\n")
    configuration = tmp_path / "apt.conf"
    configuration.write_text(
        f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "{tmp_path}/none";\n'
    )
    found = debian.host_mirror()
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    with pytest.raises(debian.DebianError, match=r"no mirror of Debian .*archive.example/ubuntu"):
        debian.unpack([PACKAGE], tmp_path / "root")
    # The lists of packages were never fetched, or were deleted, as in a container's image.
    (tmp_path / "lists").mkdir()
    configuration.write_text(f'Dir::State::lists "{tmp_path}/lists";\n')
    assert debian.host_mirror() == found
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(debian.DebianError, match="the program apt-get is missing"):
        debian.unpack([PACKAGE], tmp_path / "root")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="architecture 'armhf' is not one of amd64, arm64"):
        debian.unpack([PACKAGE], tmp_path / "root", "armhf")
    with pytest.raises(ValueError, match="no package to unpack"):
        debian.unpack([], tmp_path / "root")


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWBIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache.cache_folder() == tmp_path / "caches/lowbit"
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LOWBIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache/lowbit"
