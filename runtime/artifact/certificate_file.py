"""Reading ``certificate.json``, and whether it makes an artifact count as verified.

Two things are told apart. A certificate that is damaged (its own digest is wrong, or it is not what
its schema says) is refused, as every damaged file is. A whole one that does not speak for this
artifact leaves the artifact unverified, with the reason in words.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import ArtifactError, shorten
from llava_edge.runtime.artifact.certificate import CERTIFICATE_VERSION, Certificate, overall
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.manifest_validation import CERTIFICATE, MANIFEST
from llava_edge.runtime.util.checksummed_json import check_seal, parse_strict
from llava_edge.runtime.util.json_codec import from_json
from llava_edge.runtime.util.safe_open import read_bounded
from llava_edge.runtime.util.versions import own_version

_LIMIT = 8 << 20
_AGAIN = "Copy the artifact again, or convert again."


def read_certificate(
    root: Path, manifest: Manifest, manifest_sha256: str
) -> tuple[Certificate | None, str | None]:
    """The certificate in a folder, and why it does not count; None where it does.

    Args:
        root: the artifact.
        manifest: of the artifact.
        manifest_sha256: of the manifest's bytes.

    Returns:
        The certificate whenever there is one that can be read, also where it does not count.

    Raises:
        ArtifactError: it is damaged.
    """
    path = root / CERTIFICATE
    if not os.path.lexists(path):
        return None, f"it has no {CERTIFICATE}"
    data = read_bounded(path, _LIMIT, follow_link=True)
    document = parse_strict(data, str(path))
    check_seal(data, document, str(path))
    stated = document.get("schema_version")
    if type(stated) is not int or stated < 1:
        raise ArtifactError(f"{path} states no schema_version, so it is no certificate. {_AGAIN}")
    if stated > CERTIFICATE_VERSION:
        # Unlike a manifest of a newer schema this is no reason to refuse: nothing is run from a
        # certificate, the files are what the manifest says, and verifying an old artifact again
        # with a newer tool must not keep older runtimes from opening it.
        return None, _newer(document, stated)
    try:
        certificate = from_json(Certificate, document, CERTIFICATE)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}. {_AGAIN}") from error
    if not certificate.manifest_sha256:
        raise ArtifactError(f"{path} does not say which manifest it is for. {_AGAIN}")
    return certificate, _reason(certificate, manifest, manifest_sha256)


def _newer(document: dict[str, Any], stated: int) -> str:
    tools = document.get("tools")
    writer = tools.get("llava-edge") if isinstance(tools, dict) else None
    reads = f"llava-edge {writer:.40}" if isinstance(writer, str) else "a newer llava-edge"
    return (
        f"its {CERTIFICATE} has schema_version {stated}; this is llava-edge {own_version()}, "
        f"which reads up to {CERTIFICATE_VERSION}. {reads} reads it"
    )


def _reason(certificate: Certificate, manifest: Manifest, manifest_sha256: str) -> str | None:
    if certificate.manifest_sha256 != manifest_sha256:
        return f"its {CERTIFICATE} was issued for another {MANIFEST}"
    if certificate.target != manifest.target:
        return (
            f"its {CERTIFICATE} speaks of the {certificate.target} target; the artifact is for "
            f"the {manifest.target} target"
        )
    if certificate.mode == "none":
        return f"its {CERTIFICATE} says that verification was left out (--verify none)"
    if certificate.verdict != "pass":
        named = dict.fromkeys(
            ascii(row.name)[1:-1][:80]
            for row in certificate.stages
            if row.verdict == certificate.verdict
        )
        failed = certificate.verdict == "fail"
        what = "verification failed" if failed else "the evidence did not suffice"
        return f"its {CERTIFICATE} says that {what} ({shorten(list(named)) or 'no stage named'})"
    if not certificate.passed:
        return f"its {CERTIFICATE} says that verification did not pass"
    if not certificate.stages or overall(certificate.stages) != "pass":
        return f"its {CERTIFICATE} says passed, and its stages do not bear that out"
    if any(
        row.value is not None and row.bound is not None and row.value > row.bound
        for row in certificate.stages
    ):
        return f"its {CERTIFICATE} says passed, and a row of it is outside its own bound"
    return None
