"""Downloads files from the Hugging Face hub, through its cache."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    errors,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)

from unicl_fast.system.program import logging_at

logger = logging.getLogger("unicl_fast")


class NotOnHubError(FileNotFoundError):
    """The repository exists, but has no such file."""


def download(repository: str, file_names: Sequence[str]) -> Path:
    """Downloads the first of some files that a repository has; returns its path in the cache.

    Args:
        repository: OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit.
        file_names: in order of preference.

    Raises:
        NotOnHubError: it has none of them.
        FileNotFoundError: no such repository or revision, no permission to read it, or no network
            and none of the files in the cache.
        ValueError: not a valid name of a repository.
        OSError: a disk failed.
    """
    name, _, given = repository.partition("@")
    names, place, revision = ", ".join(file_names), f"hf-hub:{repository}", given or None
    logger.info("%s: looking for %s", place, file_names[0])
    for file_name in file_names:
        try:
            with _silent_retries():
                return Path(hf_hub_download(name, file_name, revision=revision))
        except errors.LocalEntryNotFoundError as error:  # no network, and not in the cache
            cached = [try_to_load_from_cache(name, one, revision=revision) for one in file_names]
            if paths := [path for path in cached if isinstance(path, str)]:
                return Path(paths[0])
            if all(one is _CACHED_NO_EXIST for one in cached):  # the hub has said so before
                break
            raise FileNotFoundError(
                f"{place}: the hub cannot be reached, and the cache has none of {names}: download "
                "the repository on a machine with a network, and give its folder "
                f"({_first_line(error.__cause__ or error)})"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except errors.HFValidationError as error:
            text = f"hf-hub:{repository}: expected hf-hub:OWNER/NAME ({_first_line(error)})"
            raise ValueError(text) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"{place}: no such repository or revision, or it is not public: check the name, "
                "accept its conditions on its page, or log in with hf auth login "
                f"({_first_line(error)})"
            ) from error
        except Exception as error:  # also the HTTP library's, which huggingface_hub changed twice
            if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError):
                raise
            text = f"{place}: {file_name} could not be downloaded: {_first_line(error)}; try again"
            raise FileNotFoundError(text) from error
    raise NotOnHubError(
        f"{place} has none of {names}: expected a repository of unicl_fast, open_clip, "
        "transformers, timm or peft"
    )


def _silent_retries() -> contextlib.AbstractContextManager[None]:
    """Hides huggingface_hub's warnings; without a network, eleven lines would precede our error."""
    return logging_at("huggingface_hub", logging.ERROR)


def _first_line(error: BaseException) -> str:
    """The first line of an error, without the token that a hub can repeat in it."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    token = get_token()
    return line if token is None else line.replace(token, "***")
