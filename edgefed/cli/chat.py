"""``edgefed chat``: talk to the model of a run, with prompts as in training."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.api.chat import Chat


@dataclasses.dataclass
class ChatSettings:
    """What `edgefed chat` takes."""

    source: Annotated[
        str | None,
        Setting("A checkpoint folder, the folder of a run, the state folder of a device, or http://host:port.",
                positional=True),
    ] = None  # fmt: skip
    state: Annotated[Path | None, Setting("The same, as a folder.", default="edgefed-run, if no SOURCE is given")] = (
        None
    )
    prompt: Annotated[str | None, Setting("Print one answer and exit.", default="read from the terminal")] = None
    system: Annotated[str | None, Setting("System message before the conversation.")] = None
    raw: Annotated[bool, Setting("Continue the text as it is, without the chat template.")] = False
    tokens: Annotated[int, Setting("Most tokens of an answer.", minimum=1)] = 256
    temperature: Annotated[float, Setting("Randomness; 0 takes the most likely tokens.", minimum=0)] = 0.0
    server_round: Annotated[
        int | None, Setting("The model at the start of this round; default: the newest.", flag="round", minimum=1)
    ] = None
    global_model: Annotated[bool, Setting("Of a device: the newest global model, from its server.", flag="global")] = (
        False
    )
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN", secret=True)] = None
    device: Annotated[str | None, Setting("cpu, cuda or cuda:1.", default="a GPU if there is one")] = None
    json: Annotated[bool, Setting("With --prompt: print prompt and answer as JSON.")] = False


@command("chat", ChatSettings)
def chat_command(settings: ChatSettings) -> None:
    """Talk to the model of a run.

    SOURCE is an exported checkpoint, the folder of a run, the state folder of a device, or the address of a server. The
    prompt is laid out exactly as in training. Without --prompt, each line is a message; an empty one ends.
    """
    from edgefed.api.chat import load_chat
    from edgefed.cli.output import TerminalProgress, print_json, print_note

    if settings.source and settings.state:
        raise ConfigError(f"two sources are given: {settings.source} and `state={settings.state}`")
    if settings.raw and settings.system:
        raise ConfigError("`system` has no effect with `raw`")
    if settings.json and settings.prompt is None:
        raise ConfigError("`json` needs `prompt`")
    with load_chat(
        settings.source or settings.state or "edgefed-run",
        server_round=settings.server_round, global_model=settings.global_model, token=settings.token,
        device=settings.device, progress=TerminalProgress(),
    ) as chat:  # fmt: skip
        if chat.record:
            print_note(f"{chat.record}")
        if settings.json:
            prompt = settings.prompt or ""
            print_json({"prompt": prompt, "answer": _reply(chat, settings, [], prompt, echo=False)})
        elif settings.prompt is not None:
            _reply(chat, settings, [], settings.prompt)
        else:
            _converse(chat, settings)


def _converse(chat: Chat, settings: ChatSettings) -> None:
    """Answer each line of standard input until an empty one, or the end."""
    history: list[dict[str, str]] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        answer = _reply(chat, settings, history, line)
        history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _reply(chat: Chat, settings: ChatSettings, history: list[dict[str, str]], text: str, *, echo: bool = True) -> str:
    """The answer to ``text``, printed as it is made."""

    def show(piece: str) -> None:
        if echo:
            print(piece, end="", flush=True)

    prompt: str | list[dict[str, str]] = text
    if not settings.raw:
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        prompt = [*system, *history, {"role": "user", "content": text}]
    answer = chat.answer(prompt, max_new_tokens=settings.tokens, temperature=settings.temperature, on_text=show)
    if echo:
        print()
    return answer
