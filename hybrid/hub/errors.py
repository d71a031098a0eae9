"""Error messages for failures of huggingface_hub: what is wrong, and what to do."""

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
    """Convert any error of huggingface_hub into a HybridError with our own message.

    Depending on its version it raises errors of requests, httpx or httpx2, and its own. If a proxy
    answers with a login page instead of JSON, it raises yet others. So this catches `Exception`,
    and may enclose nothing but calls of huggingface_hub.
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
            "repository, or it is private or gated. Check the name. For a private or gated one, "
            f"request access at https://huggingface.co/{repo_id} and set HF_TOKEN."
        )
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return DownloadFailed(
        f"cannot fetch {what} of {repo_id} ({reason}). Try again: downloaded parts are kept. "
        + advice(repo_id)
    )


def advice(repo_id: str) -> str:
    """Say how to get a repository onto a machine that cannot download it now."""
    folder = repo_id.rpartition("/")[2]
    return (
        "On a machine that can reach the hub, run `hf download "
        f"{repo_id} --local-dir {folder}`. Copy the folder to this machine and pass it as "
        f"-m /path/to/{folder}. Or set HF_ENDPOINT to a mirror that this machine can reach."
    )
