"""Files of the Hugging Face hub: one at a time, into the cache that all libraries share.

`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what huggingface_hub says of them. A
file that is in the cache is taken without a network.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

logger = logging.getLogger("unicl_fast")


class NotOnHubError(FileNotFoundError):
    """The repository is there, and has no such file."""


def download(repository: str, file_names: Sequence[str]) -> Path:
    """The first of some files that a repository has, as a path in the cache.

    Args:
        repository: OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit.
        file_names: in order of preference.

    Raises:
        NotOnHubError: it has none of them.
        FileNotFoundError: no such repository or revision, no permission to read it, or neither a
            network nor a file in the cache.
        ValueError: no repository's name.
        OSError: a disk that failed.
    """
    name, _, revision = repository.partition("@")
    logger.info("hf-hub:%s: looking for %s", repository, file_names[0])
    for file_name in file_names:
        try:
            with _silent_retries():
                return Path(hf_hub_download(name, file_name, revision=revision or None))
        except errors.LocalEntryNotFoundError as error:  # no network, and not in the cache
            for other in file_names:
                cached = try_to_load_from_cache(name, other, revision=revision or None)
                if isinstance(cached, str):
                    return Path(cached)
            raise FileNotFoundError(
                f"hf-hub:{repository}: the hub cannot be reached, and the cache has none of "
                f"{', '.join(file_names)}: download the repository where there is a network, and "
                f"give its folder ({_first_line(error.__cause__ or error)})"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except errors.HFValidationError as error:
            raise ValueError(
                f"hf-hub:{repository}: expected hf-hub:OWNER/NAME ({_first_line(error)})"
            ) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"hf-hub:{repository}: no such repository or revision, or it is not public: check "
                "the name, accept its conditions on its page, or log in with hf auth login "
                f"({_first_line(error)})"
            ) from error
        except OSError as error:
            if not isinstance(error, errors.HfHubHTTPError):
                raise
            raise _broken_off(repository, file_name, error) from error
        except Exception as error:  # of the library that carries HTTP, which has changed twice
            raise _broken_off(repository, file_name, error) from error
    raise NotOnHubError(
        f"hf-hub:{repository} has none of {', '.join(file_names)}: expected a repository of ours, "
        "open_clip's or timm's"
    )


@contextlib.contextmanager
def _silent_retries() -> Iterator[None]:
    """Keeps warnings of huggingface_hub back, which tries six times in 24 seconds; errors say all.

    Without a network it would print eleven lines before one of ours.
    """
    theirs = logging.getLogger("huggingface_hub")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(before)


def _broken_off(repository: str, file_name: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"hf-hub:{repository}: {file_name} could not be downloaded: {_first_line(error)}; try again"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
