"""`unicl-eval serve`."""

import contextlib
import dataclasses
import importlib.util
import secrets
import socket
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

from msgspec import Meta

from unicl_fast.evaluation.choices import LOOPBACK

from ..numbers import OneDataSet
from .command import ModelCommand


@dataclass(frozen=True, kw_only=True)
class Serve(ModelCommand):
    """Opens a page and a JSON interface: search, and images tried against typed classes.

    Nothing leaves this machine, and by default only this machine can reach them. Needs the extra
    `serve`.
    """

    data: OneDataSet = ""
    """Images to search, as in search; without it the page has no search."""
    features: str = "auto"
    """Folder that keeps their features, as in linear-probe."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own, such as 0.0.0.0, needs --token."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """Port of the page; 0 picks a free one."""
    token: str = ""
    """Secret that each request must bring, as "Authorization: Bearer" or ?token=; auto makes one
    and prints it with the address."""
    classes: tuple[str, ...] = ()
    """Classes that the page starts with: by default the data's, the run's, or a few animals."""

    def check(self) -> None:
        from unicl_fast.system.installation import install_command

        super().check()
        if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
            raise ModuleNotFoundError(
                f"serve needs Starlette and uvicorn: {install_command('serve')}"
            )
        if self.host not in LOOPBACK and not self.token:
            raise ValueError(f"--host {self.host} answers other machines: give --token, too")

    def run(self) -> None:
        """Serves until Ctrl-C. Raises OSError if the port is in use."""
        from unicl_fast.evaluation.features import ModelOnRanks
        from unicl_fast.evaluation.inference import classes_by_column, load_model
        from unicl_fast.evaluation.search import open_index
        from unicl_fast.evaluation.serving import MOST_CLASSES, make_app, make_server
        from unicl_fast.system.line import line

        token = secrets.token_urlsafe() if self.token == "auto" else self.token
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(self._listen())  # before a model is loaded
            with line(f"loading {self.checkpoint}"):
                model = load_model(self.checkpoint, device=self.device)
            index = None
            if self.data:
                folder = self.features_folder(self.features)
                on_ranks = dataclasses.replace(ModelOnRanks.of(model), progress=True)
                index = stack.enter_context(open_index(on_ranks, self.data, folder=folder))
            columns = self.own_classes()
            if index is not None:
                manifest = index.dataset.manifest
                columns = classes_by_column([manifest.class_names], [manifest.columns])
            if self.classes or not any(len(names) > 1 for names in columns.values()):
                columns = {"": self.classes[:MOST_CLASSES] or ("cat", "dog", "bird")}
            for names in columns.values():
                model.require_classes(names)
            app = make_app(
                model, name=str(self.checkpoint), columns=columns, index=index, host=self.host,
                token=token,
            )  # fmt: skip
            name = f"[{self.host}]" if ":" in self.host else self.host
            address = f"http://{name}:{listening.getsockname()[1]}/"
            print(
                f"{address}{f'?token={quote(token)}' if token else ''} (Ctrl-C ends it)", flush=True
            )
            with contextlib.suppress(KeyboardInterrupt):
                make_server(app).run(sockets=[listening])
            print()

    def _listen(self) -> socket.socket:
        kind = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=kind, backlog=64)
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]
            said = f"{self.host}, port {self.port}: {reason}; --port 0 picks a free one"
            raise OSError(said) from None
