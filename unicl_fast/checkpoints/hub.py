"""Downloads files and exports from the Hugging Face hub, and uploads exports.

Files go to the hub's shared cache, which also serves without a network. `HF_ENDPOINT`, `HF_HOME`,
`HF_TOKEN` and `HF_HUB_OFFLINE` have huggingface_hub's meaning.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    errors,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)

from unicl_fast.checkpoints.export import CONFIG_FILE, WEIGHTS_FILE
from unicl_fast.system.checked_fields import parse_json
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
            raise _no_name(repository, error) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"hf-hub:{repository}: no such repository or revision, or it is not public: check "
                "the name, accept its conditions on its page, or log in with hf auth login "
                f"({_first_line(error)})"
            ) from error
        except Exception as error:  # also the HTTP library's, which huggingface_hub changed twice
            if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError):
                raise
            raise FileNotFoundError(
                f"hf-hub:{repository}: {file_name} could not be downloaded: {_first_line(error)}; "
                "try again"
            ) from error
    raise NotOnHubError(
        f"hf-hub:{repository} has none of {', '.join(file_names)}: expected a repository of ours, "
        "open_clip's or timm's"
    )


def download_export(repository: str) -> Path:
    """Downloads an export of ours; returns its folder in the cache, raises as `download`.

    Both files are of one commit, even if a new one is pushed meanwhile. Another library's config is
    refused (ValueError) before its weights are downloaded.
    """
    config = download(repository, [CONFIG_FILE])
    values = parse_json(config.read_bytes(), where=str(config))
    if not isinstance(values, dict) or "library_name" not in values:  # transformers' lack it
        raise ValueError(
            f"hf-hub:{repository} is neither a model of ours nor of open_clip or timm: its "
            f"{CONFIG_FILE} names no architecture and no library; most models of transformers have "
            "a twin among open_clip's"
        )
    commit = config.parent.name  # the cache has a folder for each commit
    return download(f"{repository.partition('@')[0]}@{commit}", [WEIGHTS_FILE]).parent


def check_upload(repository: str) -> None:
    """Refuses an upload that would fail, before minutes are spent on a model.

    Raises:
        ValueError: not a valid name, no token, or the repository exists.
        OSError: the hub cannot be reached or refuses the token.
    """
    if "/" not in repository:
        raise ValueError(f"hf-hub:{repository}: expected OWNER/NAME, the owner being you or yours")
    with _one_sentence(repository):
        if get_token() is None:
            raise ValueError(
                f"hf-hub:{repository}: no token to write with: log in with hf auth login, or set "
                "HF_TOKEN"
            )
        if HfApi().repo_exists(repository):
            raise _there_already(repository)


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Creates a repository with all files of a folder in one commit; returns its URL.

    Raises:
        ValueError: the repository exists.
        OSError: the hub cannot be reached, refuses the token, or broke off.
    """
    api = HfApi()
    files = [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path)
        for path in sorted(folder.iterdir())
    ]
    with _one_sentence(repository):
        address = api.create_repo(repository, private=private)
        api.create_commit(repository, files, commit_message="Add a model of unicl_fast")
    return str(address)


@contextlib.contextmanager
def _one_sentence(repository: str) -> Iterator[None]:
    """Turns huggingface_hub's errors during an upload into one sentence each."""
    try:
        with _silent_retries():
            yield
    except errors.HFValidationError as error:
        raise _no_name(repository, error) from error
    except ValueError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise OSError(
            f"hf-hub:{repository}: HF_HUB_OFFLINE is set, which allows no upload: unset it"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 409:
            raise _there_already(repository) from error
        if status in (401, 403):
            raise OSError(
                f"hf-hub:{repository}: the hub refuses the token, which must be valid and may "
                f"write to {repository.partition('/')[0]}: log in with hf auth login, or set "
                f"HF_TOKEN ({_first_line(error)})"
            ) from error
        raise OSError(f"hf-hub:{repository}: the hub refused: {_first_line(error)}") from error
    except Exception as error:  # of the HTTP library, or of the one for large files
        raise OSError(
            f"hf-hub:{repository}: the hub cannot be reached, or broke off: "
            f"{_first_line(error.__cause__ or error)}"
        ) from error


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
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
