"""Hub ids: their syntax, and their files through huggingface_hub, whose errors become one line."""

from __future__ import annotations

import re
from pathlib import Path

from infopt.errors import InfoptError, InputError

_ID = re.compile(r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?$")
_CONFIG_FILES = ["config.json"]
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_OFFLINE_HINT = "unset HF_HUB_OFFLINE and check the network, or give a folder"


def is_id(text: str) -> bool:
    """Whether `text` could name a model on the hub: `name` or `owner/name`, at most 96 characters."""
    return len(text) <= 96 and bool(_ID.match(text)) and not re.search(r"--|\.\.|\.git$|[.-]$", text)


def snapshot(
    name: str, revision: str | None = None, *, config_only: bool = False, with_code: bool = False, local_only: bool = False
) -> Path:
    """The folder of a hub model's files, downloaded if need be: safetensors, config, tokenizer; never pickles.

    Raises InputError for a model that is unknown, gated or not here while offline.
    """
    from huggingface_hub import errors, snapshot_download

    code = ["*.py"] if with_code else []
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=(_CONFIG_FILES if config_only else _FILES) + code,
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=local_only,
        )
    except errors.GatedRepoError:
        hint = f"accept its terms on its hub page, then `hf auth login`, then `infopt models fetch {name}`"
        raise InputError(f"{name}: a gated model", hint=hint) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: no revision {revision!r}", hint="give a branch, tag or commit of that model") from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private model needs `hf auth login`"
        raise InputError(f"{name}: neither a folder here nor a model on the hub", hint=hint) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        message = f"{name}: neither a folder here nor in the hub's cache, and the hub cannot be reached"
        raise InputError(message, hint=_OFFLINE_HINT) from None
    except errors.HFValidationError as error:
        raise InputError(
            f"{name}: not a hub id: {str(error).splitlines()[0]}", hint="owner/name, as on the model's hub page"
        ) from None
    except Exception as error:  # the hub's HTTP client, whose exceptions differ between versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InfoptError(f"{name}: download failed: {reason}", hint=_OFFLINE_HINT) from error
    return Path(folder)
