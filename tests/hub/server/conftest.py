"""One server for each file of tests; and in this process a client that is not offline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub.server.serving import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def online() -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # not exported, and there

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield
    close_session()
