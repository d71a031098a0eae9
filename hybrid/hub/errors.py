"""What the user reads when huggingface_hub fails: our own words, and what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from hybrid.errors import DownloadFailed, HybridError, ModelNotFound

_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
)


@contextlib.contextmanager
def hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Say in our own words what went wrong in huggingface_hub.

    It raises errors of requests, httpx or httpx2, as its version has it, and of its own; a
    proxy's login page in place of JSON makes it raise yet others. Hence `Exception`, and hence
    nothing but calls of huggingface_hub belongs under this.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise  # our disk, not the network
        raise _explain(error, repo_id, what) from error


def _explain(error: Exception, repo_id: str, what: str) -> HybridError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403, 404):
        return ModelNotFound(
            f"the hub does not give {what} of {repo_id} (HTTP {status}): there is no such "
            "repository, or it is private or gated. Check the name; for a private or gated one, "
            f"ask for access at https://huggingface.co/{repo_id} and set HF_TOKEN."
        )
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return DownloadFailed(
        f"cannot fetch {what} of {repo_id} ({reason}). Try again: what has come is kept. "
        + advice(repo_id)
    )


def advice(repo_id: str) -> str:
    """How to get a repository onto a machine that cannot fetch it now."""
    folder = repo_id.rpartition("/")[2]
    return (
        "Where the hub can be reached, run `hf download "
        f"{repo_id} --local-dir {folder}`, copy the folder to this machine and pass it: "
        f"-m /path/to/{folder}. Or set HF_ENDPOINT to a mirror that this machine can reach."
    )
