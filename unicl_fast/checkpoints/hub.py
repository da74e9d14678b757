"""Downloads files and exports from the Hugging Face hub, through its cache, and uploads exports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    errors,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)

from unicl_fast.checkpoints.export import CONFIG_FILE, LIBRARY, WEIGHTS_FILE
from unicl_fast.system.program import logging_at
from unicl_fast.system.untrusted_files import read_json
from unicl_fast.text.file_tokenizer import TOKENIZER_FILES

logger = logging.getLogger("unicl_fast")

_LOG_IN = "log in with hf auth login, or set HF_TOKEN"


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
            raise _no_name(repository, error) from error
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


def download_export(repository: str) -> Path:
    """Downloads an export of ours; returns its folder in the cache, raises as `download`.

    Both files are from one commit, even if a new one is pushed meanwhile. Another library's config
    is refused (ValueError) before its weights are downloaded.
    """
    config = download(repository, [CONFIG_FILE])
    values = read_json(config)
    if not isinstance(values, dict) or "library_name" not in values:  # transformers has none
        raise ValueError(
            f"hf-hub:{repository} is not a model of unicl_fast, open_clip, timm or transformers: "
            f"its {CONFIG_FILE} names no architecture, model_type or library"
        )
    # the cache has a folder for each commit
    at_commit = f"{repository.partition('@')[0]}@{config.parent.name}"
    ours = values.get(LIBRARY)
    model = ours.get("model") if isinstance(ours, dict) else None
    if isinstance(model, dict) and model.get("tokenizer"):
        for name in TOKENIZER_FILES:
            with contextlib.suppress(NotOnHubError):
                download(at_commit, [name])
    return download(at_commit, [WEIGHTS_FILE]).parent


def check_upload(repository: str) -> None:
    """Refuses an upload that would fail, before minutes are spent on a model.

    Raises:
        ValueError: not a valid name, no token, or the repository exists.
        OSError: the hub cannot be reached or refuses the token.
    """
    place = f"hf-hub:{repository}"
    if "/" not in repository:
        raise ValueError(f"{place}: expected OWNER/NAME; OWNER is you or an organization of yours")
    if get_token() is None:
        raise ValueError(f"{place}: no token to write with: {_LOG_IN}")
    with _one_sentence(repository):
        if HfApi().repo_exists(repository):
            raise _there_already(repository)


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Creates a repository with all files of a folder in one commit; returns its URL.

    Raises:
        ValueError: the repository exists.
        OSError: the hub cannot be reached, refuses the token, or broke off.
    """
    with _one_sentence(repository):
        address = HfApi().create_repo(repository, private=private)
        message = "Add a model of unicl_fast"
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(address)


@contextlib.contextmanager
def _one_sentence(repository: str) -> Iterator[None]:
    """Turns huggingface_hub's errors during an upload into one sentence each."""
    place = f"hf-hub:{repository}"
    try:
        with _silent_retries():
            yield
    except errors.HFValidationError as error:
        raise _no_name(repository, error) from error
    except ValueError:
        raise
    except errors.OfflineModeIsEnabled as error:
        text = f"{place}: HF_HUB_OFFLINE is set, which allows no upload: unset it"
        raise OSError(text) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 409:
            raise _there_already(repository) from error
        if status in (401, 403):
            raise OSError(
                f"{place}: the hub refuses the token, which must be valid and allowed to write to "
                f"{repository.partition('/')[0]}: {_LOG_IN} ({_first_line(error)})"
            ) from error
        raise OSError(f"{place}: the hub refused: {_first_line(error)}") from error
    except Exception as error:  # of the HTTP library, or of the one for large files
        reason = _first_line(error.__cause__ or error)
        raise OSError(f"{place}: the hub cannot be reached, or broke off: {reason}") from error


def _there_already(repository: str) -> ValueError:
    return ValueError(
        f"hf-hub:{repository} is there already: name a new one, or replace its files with "
        f"hf upload {repository} OUT"
    )


def _no_name(repository: str, error: Exception) -> ValueError:
    return ValueError(f"hf-hub:{repository}: expected hf-hub:OWNER/NAME ({_first_line(error)})")


def _silent_retries() -> contextlib.AbstractContextManager[None]:
    """Hides huggingface_hub's warnings; without a network, eleven lines would precede our error."""
    return logging_at("huggingface_hub", logging.ERROR)


def _first_line(error: BaseException) -> str:
    """The first line of an error, without the token that a hub can repeat in it."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    token = get_token()
    return line if token is None else line.replace(token, "***")
