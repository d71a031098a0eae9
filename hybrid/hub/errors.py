"""Error messages for failures of the Hub and of huggingface_hub: what is wrong, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hybrid.errors import DownloadFailed, HybridError, ModelNotFound
from hybrid.hub.transfer import requested_wait
from hybrid.hub.watch import SourceFailed

_MAX_REASON = 300  # characters: a server may write a long one


@contextlib.contextmanager
def hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Convert any error of the network or of huggingface_hub into a HybridError.

    Depending on its version it raises errors of requests, httpx or httpx2, and its own. If a proxy
    answers with a login page instead of JSON, there are yet others. So this catches `Exception`,
    and may enclose nothing but calls of huggingface_hub, `transfer` and `watch`. An OSError that no
    server caused is one of our disk, and passes.
    """
    try:
        yield
    except SourceFailed as failed:
        raise _explain(failed.error, repo_id, what) from failed.error
    except OSError:
        raise
    except Exception as error:
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
    wait_s = None if response is None else requested_wait(response.headers)
    if wait_s is not None and wait_s > 0:
        return DownloadFailed(
            f"cannot fetch {what} of {repo_id}: the hub is busy (HTTP {status}) and wants a pause "
            f"of {wait_s:,.0f} s. Run the same command again after that: downloaded parts are "
            f"kept. A token in HF_TOKEN allows more requests. {advice(repo_id)}"
        )
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:_MAX_REASON]
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
