"""The jars of Apache Kafka: fetched once from Maven's central repository, kept in the user's cache.

Notable choices
- Of jgo only its pure-Python resolver is used, so neither Maven nor Java need be installed. `jgo.build` would also
  sort the jars into modules, for which it fetches a JDK of its own, and lets the log4j binding's dependency
  management replace kafka-clients by an older one; the list resolved here equals Maven's.
- A download is built aside and renamed when whole: a folder under its final name is complete, and no start asks
  the network again.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ops.errors import UserError

KAFKA: Final = "org.apache.kafka:kafka_2.13:4.3.1"
LOGGING: Final = "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4"
"""Kafka 4 brings slf4j 1.7 and log4j, but no binding between them."""

FETCH_TIMEOUT_S: Final = 30
PROBE_TIMEOUT_S: Final = 5
_COMPLETE: Final = "complete"
_ASIDE: Final = "fetching-"

Progress = Callable[[str], None]
"""Told in a few words what is being done."""


def cache_dir() -> Path:
    """Where jars are kept for all data directories of this user."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "dwell"


def cached_jars() -> Path | None:
    """The folder of the jars if it is there and whole; asks no network."""
    folder = _folder()
    try:
        names = (folder / _COMPLETE).read_text().split()
    except OSError:
        return None
    return folder if names and all((folder / name).is_file() for name in names) else None


def kafka_jars(progress: Progress | None = None) -> Path:
    """The folder of the jars, fetched first (some 45 MB) if need be.

    Raises `UserError` when a coordinate cannot be fetched or the cache not be written.
    """
    folder = cached_jars()
    if folder is not None:
        return folder
    try:
        with _alone(cache_dir()):
            return cached_jars() or _fetch(_folder(), progress or _silent)
    except OSError as error:
        raise UserError(
            f"The jars of Apache Kafka cannot be kept in {cache_dir()}: {error.strerror or error}; make that folder "
            "writable, or set XDG_CACHE_HOME to one that is."
        ) from None


def unreachable() -> str:
    """Why the repository cannot be reached just now; empty if it can."""
    import requests
    from jgo.maven import MavenContext

    group, name, version = KAFKA.split(":")
    with tempfile.TemporaryDirectory() as aside:
        context = MavenContext(repo_cache=Path(aside), timeout=PROBE_TIMEOUT_S)
        try:
            context.project(group, name).at_version(version).artifact(packaging="pom").resolve()
        except (requests.RequestException, RuntimeError) as error:
            return _cause(error)
    return ""


def _folder() -> Path:
    parts = (coordinate.split(":")[1:] for coordinate in (KAFKA, LOGGING))
    return cache_dir() / "+".join("-".join(part) for part in parts)


def _silent(_: str) -> None:
    pass


@contextmanager
def _alone(base: Path) -> Iterator[None]:
    """One process fetches, the others wait for it."""
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path, progress: Progress) -> Path:
    import requests
    from jgo.maven import MavenContext, PythonResolver

    resolver = PythonResolver()
    download = resolver.download
    fetching = KAFKA

    def reporting(artifact: Any) -> Path | None:
        """Remembers what is being fetched, for the one sentence that a failure needs."""
        nonlocal fetching
        fetching = f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}"
        progress(f"fetching {fetching}")
        path: Path | None = download(artifact)
        return path

    resolver.download = reporting
    for left in folder.parent.glob(f"{_ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_ASIDE) as aside:
        context = MavenContext(
            resolver=resolver, repo_cache=Path(aside) / "repository", timeout=FETCH_TIMEOUT_S
        )
        wanted = [context.create_dependency(f"{each}!") for each in (KAFKA, LOGGING)]
        whole = Path(aside) / "whole"
        whole.mkdir()
        names = []
        try:
            inputs, transitive = resolver.resolve(wanted)
            needed = [each for each in transitive if each.scope in ("compile", "runtime")]
            for dependency in [*inputs, *needed]:
                jar = dependency.artifact.resolve()
                shutil.move(jar, whole / jar.name)
                names.append(jar.name)
        except Exception as error:  # jgo lets through whatever its parsers raise
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                raise
            raise UserError(
                f"{fetching}, a part of the embedded Apache Kafka, could not be fetched "
                f"({_cause(error)}); a first start needs the network (or {folder} from another machine), "
                "or name an existing cluster with --bootstrap."
            ) from None
        (whole / _COMPLETE).write_text("\n".join(names))
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
    return folder


def _cause(error: BaseException) -> str:
    """What the network said, without the address and the chain of wrappers."""
    import requests

    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not trusted"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    if isinstance(error, RuntimeError):
        return "the repository does not have it"
    return type(error).__name__
