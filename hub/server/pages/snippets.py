"""How to load a repository from this very server, in lines to copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery.hub.cards import Snippet, loading, word
from surgery.hub.interfaces import Repository

_ENVIRONMENT = 'import os\n\nos.environ["HF_ENDPOINT"] = "{}"  # before the libraries are imported\n\n{}'
_DATASETS = 'from datasets import load_dataset\n\ndata = load_dataset("{}")'
_FOLDER = 'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{}")'


def snippets(found: Repository, facts: Mapping[str, object], url: str) -> list[Snippet]:
    """For what the files are; each can be run as it stands."""
    name = str(found.name)
    folder = word(found.name.name)
    if found.kind == "dataset":
        loads = [Snippet("datasets", "python", _DATASETS.format(name))]
        commands = [Snippet("hf", "sh", f"hf download {name} --repo-type dataset")]
        return [_here(item, url) for item in (*loads, *commands)]
    loads = loading(facts, name) if facts.get("kind") else [Snippet("huggingface_hub", "python", _FOLDER.format(name))]
    commands = [
        Snippet("hf", "sh", f"hf download {name}"),
        Snippet("surgery pull", "sh", f"surgery pull {name} -o {folder} --endpoint {word(url)}"),
    ]
    if facts.get("kind") == "adapter" and isinstance(base := facts.get("base"), str):
        merge = f"surgery merge {word(base)} {name} -o {word(found.name.name + '-merged')}"
        commands.append(Snippet("surgery merge", "sh", merge))
    return [_here(item, url) for item in (*loads, *commands)]


def _here(snippet: Snippet, url: str) -> Snippet:
    """The same, with this server as the endpoint."""
    if snippet.language == "python":
        return replace(snippet, code=_ENVIRONMENT.format(url, snippet.code))
    if "--endpoint" in snippet.code:
        return snippet
    return replace(snippet, code=f"export HF_ENDPOINT={word(url)}\n{snippet.code}")
