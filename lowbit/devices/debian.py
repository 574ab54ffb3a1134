"""Debian packages and what they depend on, unpacked into a folder of their own.

apt works here with a state, a cache and a list of packages of its own, all inside the folder that
is being built: nothing is installed, the host's apt knows nothing of it, and no rights are needed.
Signatures are checked by the host's Debian keys.  The mirror, and how it is reached, is the one
that the host's apt is set up for.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

from lowbit.devices import cache

# Python 3.11, for which there are wheels, and qemu 7.2, the last one here that takes plugins.
RELEASE = "bookworm"
ARCHITECTURES = ("amd64", "arm64")
# Of a Debian system these are links into /usr, which no package of this release contains.
_MERGED = {"amd64": ("bin", "sbin", "lib", "lib64"), "arm64": ("bin", "sbin", "lib")}
# Of the package debian-archive-keyring, which every Debian has; the second since trixie.
_KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)
_PACKAGES = "Created-By: Packages"  # apt's filter: lists of packages, not of translations
_DOWNLOAD_SECONDS = 1800


class DebianError(OSError):
    """Packages cannot be had: apt, a mirror of Debian, the network or a package is missing."""


def unpack(
    packages: Sequence[str],
    folder: str | os.PathLike,
    architecture: str = "amd64",
    suite: str | None = None,
) -> dict[str, str]:
    """Unpacks packages and what they depend on into a folder, once.

    A later call with the same arguments finds it finished (`cache.build_once`).  No package's
    scripts run.

    Args:
      packages: names, or name=version.
      folder: where they go.
      architecture: one of ARCHITECTURES.
      suite: packages come from this one where it has them, before RELEASE: bookworm-backports.

    Returns:
      Version by name, of everything in the folder.

    Raises:
      ValueError: for another architecture, no package, or a folder with something else in it.
      DebianError: where apt, Debian's mirror or a package is missing, or the network is.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    if not packages:
        raise ValueError("no package to unpack; at least 1 is needed")
    request = {
        "packages": sorted(packages),
        "architecture": architecture,
        "suites": [RELEASE, *([suite] if suite else [])],
    }

    def make(temporary):
        archives = _download(packages, _apt(temporary / "apt", request), suite)
        versions = _extract(archives, temporary, _MERGED[architecture])
        shutil.rmtree(temporary / "apt")
        return versions

    return cache.build_once(folder, request, make)


def host_mirror() -> str:
    """Returns the address of the mirror of Debian in the host's apt sources.

    Raises DebianError where there is no apt, or none of its sources is Debian's.
    """
    for tool in ("apt-get", "dpkg-deb", "tar"):
        if shutil.which(tool) is None:
            raise DebianError(
                f"the program {tool} is missing: Debian's packages need a host with apt (Debian)"
            )
    listed: list[list[str]] = []
    # Without release information sources are listed that were never downloaded, with no label.
    for options in ((), ("--no-release-info",)):
        text = _run(
            ["apt-get", "indextargets", *options, "--format", "$(REPO_URI)|$(LABEL)", _PACKAGES]
        )
        listed = [line.split("|") for line in text.splitlines()]
        for uri, label in listed:
            # Security updates have another label.  Another release of Debian has the same mirror.
            if label == "Debian" or (options and uri.rstrip("/").endswith("/debian")):
                return uri
    found = ", ".join(sorted({uri for uri, _ in listed})) or "none"
    raise DebianError(f"no mirror of Debian among the sources of the host's apt ({found})")


def _apt(folder, request):
    """Returns the path of an apt configuration whose files all lie in `folder`."""
    mirror = host_mirror()
    keyring = next(filter(os.path.exists, _KEYRINGS), None)
    for name in ("lists/partial", "archives/partial", "parts", "preferences"):
        (folder / name).mkdir(parents=True)
    signed_by = f" signed-by={keyring}" if keyring else ""  # else by what apt trusts for all
    lines = [
        f"deb [arch={request['architecture']}{signed_by}] {mirror} {suite} main\n"
        for suite in request["suites"]
    ]
    (folder / "sources.list").write_text("".join(lines))
    own = {
        "APT::Architecture": request["architecture"],
        "APT::Sandbox::User": "",  # the folder is the user's own; as root apt would be _apt
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Debug::NoLocking": "true",  # of the host's dpkg
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": folder / "parts",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": folder / "preferences",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "parts",
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": "/dev/null",  # nothing is installed: every dependency is fetched
    }
    path = folder / "apt.conf"
    # How the network is reached (proxies) is the host's; its hooks after an update are not run.
    path.write_text(
        "".join(f"{line}\n" for line in _run(["apt-config", "dump", "Acquire"]).splitlines())
        + "#clear APT::Architectures;\n#clear Acquire::Languages;\n"
        + f'APT::Architectures {{ "{request["architecture"]}"; }};\n'
        + "".join(f'{name} "{value}";\n' for name, value in own.items())
    )
    return path


def _download(packages, configuration, suite):
    """Returns the folder of the archives of packages and their dependencies."""
    _run(["apt-get", "-qq", "--error-on=any", "update"], configuration, "the list of packages")
    command = ["apt-get", "-qq", "-y", "--download-only", "--no-install-recommends"]
    command += ["-t", suite] if suite else []
    _run([*command, "install", *packages], configuration, ", ".join(packages))
    return configuration.parent / "archives"


def _extract(archives, folder, merged):
    """Unpacks every archive; returns version by name."""
    for name in merged:
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    versions = {}
    for archive in sorted(archives.glob("*.deb")):
        name, version = _run(
            ["dpkg-deb", "--showformat", "${Package} ${Version}", "--show", archive]
        ).split()
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
        ) as reader:
            # dpkg-deb --extract would put folders in the place of the links.
            tar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", folder]
            done = subprocess.run(tar, stdin=reader.stdout, capture_output=True, check=False)
        if done.returncode or reader.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise DebianError(f"{archive.name} cannot be unpacked into {folder}: {said}")
        versions[name] = version
    return versions


def _run(command, configuration=None, subject=""):
    """Returns a program's output; raises DebianError with its last lines where it fails."""
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    if configuration is not None:
        environment["APT_CONFIG"] = str(configuration)
    try:
        done = subprocess.run(
            list(map(str, command)),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise DebianError(f"the program {command[0]} is missing") from error
    except subprocess.TimeoutExpired as error:
        raise DebianError(f"{subject}: no end within {_DOWNLOAD_SECONDS} s") from error
    if done.returncode:
        said = [
            line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()
        ]
        errors = [line for line in said if line.startswith("E:")] or said
        raise DebianError(f"{subject or command[0]}: apt fails: {'; '.join(errors[-3:])}")
    return done.stdout.decode()
