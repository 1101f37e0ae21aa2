"""Who made a version: Ed25519 signatures over a manifest's bytes as they were written.

Notable choices
- The signature stands in the commit record and covers the manifest's bytes, not its fields: a reader of an older
  release, which ignores added fields, can still check it. The values need none of their own: the manifest has the
  digest of the full state.
- Keys are files in PEM, so that any tool can make and keep them; `dwell weights key` makes a pair. The private one
  is the learner's (`learn.signing_key`), the public one stands with whoever takes versions (`actor.trusted_key`).
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

PRIVATE = "dwell-signing.pem"
PUBLIC = "dwell-trusted.pem"


class KeyFileError(ValueError):
    """A key that cannot be used; the message names the file and what would be right."""


class Signer:
    """The private key of a learner."""

    def __init__(self, path: Path) -> None:
        """Raises `KeyFileError`."""
        key = _read(path, "private")
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"{path} is no Ed25519 private key")
        self._key = key

    def sign(self, sealed: bytes) -> bytes:
        """The signature of a manifest's bytes."""
        return self._key.sign(sealed)

    @property
    def trust(self) -> "Trust":
        """What those who take its versions know."""
        return Trust(self._key.public_key())


class Trust:
    """The public key of the one learner whose versions are taken."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def read(cls, path: Path) -> "Trust":
        """Raises `KeyFileError`."""
        key = _read(path, "public")
        if not isinstance(key, Ed25519PublicKey):
            raise KeyFileError(f"{path} is no Ed25519 public key")
        return cls(key)

    def holds(self, sealed: bytes, signature: bytes) -> bool:
        """Whether the learner signed these bytes."""
        try:
            self._key.verify(signature, sealed)
        except InvalidSignature:
            return False
        return True


def signer(path: str) -> Signer | None:
    """The signer of a setting; None where it is empty."""
    return Signer(Path(path)) if path else None


def trust(path: str) -> Trust | None:
    """The trust of a setting; None where it is empty: whatever the log holds is taken then."""
    return Trust.read(Path(path)) if path else None


def trust_in(own: Signer | None) -> Trust | None:
    """The trust of a learner in what it signed itself; None where it does not sign."""
    return None if own is None else own.trust


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Write a new pair of keys, private and public; raises `KeyFileError` rather than replace one."""
    private, public = folder / PRIVATE, folder / PUBLIC
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    known = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content, mode in ((private, secret, 0o600), (public, known, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except FileExistsError as error:
        raise KeyFileError(f"{error.filename} is there already: name an empty folder") from None
    except OSError as error:
        raise KeyFileError(f"{folder}: {error.strerror}") from None
    return private, public


def _read(path: Path, which: str) -> object:
    try:
        content = path.read_bytes()
        if which == "private":
            return load_pem_private_key(content, password=None)
        return load_pem_public_key(content)
    except OSError as error:
        raise KeyFileError(f"the {which} key {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileError(
            f"{path} is no {which} key in PEM; `dwell weights key FOLDER` makes a pair"
        ) from None
