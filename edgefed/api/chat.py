"""`load_chat`: a model of a run, prompted exactly as it was trained."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.formats.card import ExportRecord
    from edgefed.progress import ProgressSink

Message = Mapping[str, str]


class Chat:
    """A model and its tokenizer, whose template lays out conversations in training, too.

    ``record``: where the model is from; None for a checkpoint that edgefed has not exported.
    """

    def __init__(self, model: Any, tokenizer: Any, record: ExportRecord | None) -> None:
        self.model, self.tokenizer, self.record = model, tokenizer, record

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of a prompt, as the training data has them: plain text, or a conversation that asks for an answer.

        Raises ConfigError where the chat template refuses the conversation.
        """
        from edgefed.training.chat_template import ChatTemplate, ConversationRefused, Layout
        from edgefed.training.tokenizer import TextEncoder

        encoder = TextEncoder(self.tokenizer)
        if isinstance(prompt, str):
            return encoder.encode_prompt(Layout(prompt, []))
        try:
            text = ChatTemplate(self.tokenizer).prompt(prompt)
        except ConversationRefused as error:
            raise ConfigError(f"this conversation cannot be laid out: {error}") from error
        return encoder.encode_prompt(Layout(text, [], special_tokens=False))

    def answer(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> str:
        """The answer to a conversation, or what follows a text.

        ``temperature`` 0: the most likely tokens. ``on_text`` gets the pieces of the answer as they are made.
        """
        return self._generate(self.encode(prompt), max_new_tokens, temperature, on_text)

    def _generate(self, ids: list[int], most: int, temperature: float, on_text: Callable[[str], None]) -> str:
        import torch
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                on_text(text)

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and len(ids) + most > window:
            most = window - len(ids)
            if most < 1:
                raise ConfigError(f"the conversation has {len(ids)} tokens, and the model reads at most {window}")
        inputs = torch.tensor([ids], device=self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.inference_mode():
            output = self.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=most, streamer=streamer,
                eos_token_id=self._ends(), pad_token_id=self.tokenizer.eos_token_id, **sampling,
            )  # fmt: skip
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def _ends(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and those that the model names."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        more = [named] if isinstance(named, int) else list(named or [])
        return sorted({self.tokenizer.eos_token_id, *more})


@contextlib.contextmanager
def load_chat(
    source: str | Path,
    *,
    server_round: int | None = None,
    global_model: bool = False,
    token: str | None = None,
    device: str | None = None,
    progress: ProgressSink | None = None,
) -> Iterator[Chat]:
    """Load the model of ``source``: a checkpoint folder, or what `edgefed.export` takes.

    >>> with edgefed.load_chat("edgefed-run") as chat:                                    # doctest: +SKIP
    ...     print(chat.answer([{"role": "user", "content": "Name three colours."}]))

    A run, a server or a device is exported to a temporary folder first, which is deleted at the end of the context.
    ``device``: as torch names it; None: a GPU if there is one. Raises what `edgefed.export` raises, and ModelNotFound.
    """
    from edgefed.exporting import export_model, is_address
    from edgefed.formats.card import read_record
    from edgefed.progress import NullProgress

    sink = progress or NullProgress()
    folder = Path(source)
    if not is_address(source) and not folder.is_dir():
        raise ConfigError(
            f"no model in {str(source)!r}: it is neither a folder nor the address of a server",
            remedy="Pass a checkpoint folder, the folder of a run, the state folder of a device, or http://host:port.",
        )
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ConfigError(
            f"no model in {str(source)!r}: it is a PEFT adapter without its base model",
            remedy="Pass a checkpoint: `edgefed export --to hf` writes one, with the adapter merged.",
        )
    with contextlib.ExitStack() as stack:
        if is_address(source) or not (folder / "config.json").exists():
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgefed-chat-"))
            folder = export_model(
                source, Path(scratch) / "model", server_round, global_model=global_model, token=token, progress=sink
            )
        sink.phase("load")
        import torch
        from transformers import AutoModelForCausalLM

        from edgefed.moe.loading import without_progress_bars
        from edgefed.training.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder)
        with without_progress_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False, dtype="auto")
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        sink.done()
        yield Chat(model, tokenizer, read_record(folder))
