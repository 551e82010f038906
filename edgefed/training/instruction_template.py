"""The chat template of models that have none: headings, as Alpaca and Dolly are usually written.

    ### Instruction:
    Name a colour.

    ### Response:
    Blue</s>

`edgefed.training.tokenizer.load_tokenizer` gives it to such tokenizers, and an export stores it, so that training,
`edgefed chat` and ``apply_chat_template`` of transformers lay out a conversation in the same way.
"""

from __future__ import annotations

import json
from typing import Any

_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '### Response:\\n' }}{{ message.content or '' }}{{ eos_token }}{{ '' if loop.last else '\\n\\n' }}"
    "{% else %}"
    "{{ '### ' + ('Instruction' if message.role == 'user' else message.role | capitalize) + ':\\n' }}"
    "{{ message.content or '' }}{{ '\\n\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


def instruction_template(tokenizer: Any) -> str:
    """Return the template; it begins with the special tokens that the tokenizer puts before a text, such as <s>."""
    prefix, _ = special_tokens_around(tokenizer)
    if not prefix:
        return _TEMPLATE
    if prefix == [getattr(tokenizer, "bos_token_id", None)]:
        return "{{ bos_token }}" + _TEMPLATE
    text = json.dumps("".join(tokenizer.convert_ids_to_tokens(prefix)), ensure_ascii=False)
    return "{{ " + text + " }}" + _TEMPLATE


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    plain = tokenizer(["a"], add_special_tokens=False, verbose=False)["input_ids"][0]
    full = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
