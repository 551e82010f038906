"""Chat templates as models publish them: which part of a conversation is in the loss, and which lines are refused."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from edgefed.embedded import tiny_model_directory
from edgefed.errors import DataError
from edgefed.training.chat_template import ChatTemplate
from edgefed.training.data import Example, Segment, load_examples
from edgefed.training.encoding import encode_examples
from edgefed.training.records import parse_record

sys.path.insert(0, str(Path(__file__).parent))
from toy_tokenizers import ByteTokenizer, bracketed, byte_level, learned  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKS = ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|endoftext|>"]
# As reasoning models have it: the request for an answer opens a think block, finished turns do not show one.
OPENS_THINK = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# As Qwen3 has it: reasoning of earlier turns is dropped, the last turn shows a block, if only an empty one.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = m.content if m.content is string else '' %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3_THINKING = QWEN3.replace(
    "'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
NEMOTRON = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n<think></think>' + m.content | trim + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
DEEPSEEK_MARKS = [
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
]
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] "
    "+ '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DEEPSEEK_R1 = DEEPSEEK.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}")
DEEPSEEK_V31 = DEEPSEEK.replace("'<｜Assistant｜>' + m", "'<｜Assistant｜></think>' + m").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>' }}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_MARKS = ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last or loop.index0 == rest | length - 2 else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
GPT_OSS = (
    "{{- '<|start|>system<|message|>You are ChatGPT.<|end|>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
GPT_OSS_MARKS = ["<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>"]
# SmolLM3's way of saying what the assistant wrote; and one that leaves the end mark outside.
MARKED = CHATML.replace(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}",
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Writes a generation prompt behind every conversation, asked or not, and begins it otherwise than an answer, as
# Command R7B's.
ALWAYS_ASKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>"
)
PHI_MARKS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [Segment(content, index % 2 == 1, roles[index % 2]) for index, content in enumerate(contents)]
    return Example((*([Segment(system, False, "system")] if system else []), *turns))


def in_loss(template, marks, example, **settings):
    tokenizer = byte_level(marks, template, **settings)
    return bracketed(encode_examples([example], tokenizer, 4096), tokenizer)


HEAD = "<|im_start|>assistant\n"
TWO = chat("same", "same", "why", "so")  # the answer's words stand in the question, too


def turn(text, role="user"):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "marks", "settings", "expected"),
    [
        (CHATML, CHATML_MARKS, {}, f"{turn('same')}{HEAD}⟦same<|im_end|>\n⟧{turn('why')}{HEAD}⟦so<|im_end|>\n⟧"),
        (OPENS_THINK, CHATML_MARKS, {}, f"{turn('same')}{HEAD}⟦same<|im_end|>\n⟧{turn('why')}{HEAD}⟦so<|im_end|>\n⟧"),
        (
            QWEN3, CHATML_MARKS, {},
            f"{turn('same')}{HEAD}⟦same<|im_end|>\n⟧{turn('why')}{HEAD}⟦<think>\n\n</think>\n\nso<|im_end|>\n⟧",
        ),
        (
            QWEN3_THINKING, CHATML_MARKS, {},
            f"{turn('same')}{HEAD}⟦same<|im_end|>\n⟧{turn('why')}{HEAD}<think>\n⟦\n</think>\n\nso<|im_end|>\n⟧",
        ),
        (
            NEMOTRON, CHATML_MARKS, {},
            f"{turn('same')}{HEAD}<think>⟦</think>same<|im_end|>\n⟧{turn('why')}{HEAD}<think>⟦</think>so<|im_end|>\n⟧",
        ),
        (
            DEEPSEEK, DEEPSEEK_MARKS, {"bos": "<｜begin▁of▁sentence｜>"},
            "<｜begin▁of▁sentence｜><｜User｜>same<｜Assistant｜>⟦same<｜end▁of▁sentence｜>⟧"
            "<｜User｜>why<｜Assistant｜>⟦so<｜end▁of▁sentence｜>⟧",
        ),
        (
            DEEPSEEK_R1, DEEPSEEK_MARKS, {"bos": "<｜begin▁of▁sentence｜>"},
            "<｜begin▁of▁sentence｜><｜User｜>same<｜Assistant｜>⟦same<｜end▁of▁sentence｜>⟧"
            "<｜User｜>why<｜Assistant｜>⟦so<｜end▁of▁sentence｜>⟧",
        ),
        (
            DEEPSEEK_V31, DEEPSEEK_MARKS, {"bos": "<｜begin▁of▁sentence｜>"},
            "<｜begin▁of▁sentence｜><｜User｜>same<｜Assistant｜>⟦</think>same<｜end▁of▁sentence｜>⟧"
            "<｜User｜>why<｜Assistant｜>⟦</think>so<｜end▁of▁sentence｜>⟧",
        ),
        (
            LLAMA3, LLAMA3_MARKS, {"bos": "<|begin_of_text|>"},
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nsame<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦same<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nwhy<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦so<|eot_id|>⟧",
        ),
        (
            MISTRAL, ["</s>", "<s>", "[INST]", "[/INST]"], {"bos": "<s>"},
            "<s>[INST] same [/INST]⟦ same</s>⟧[INST] why [/INST]⟦ so</s>⟧",
        ),
        (
            GPT_OSS, GPT_OSS_MARKS, {},
            "<|start|>system<|message|>You are ChatGPT.<|end|><|start|>user<|message|>same<|end|>"
            "<|start|>assistant⟦<|channel|>final<|message|>same<|end|>⟧<|start|>user<|message|>why<|end|>"
            "<|start|>assistant⟦<|channel|>final<|message|>so<|return|>⟧",
        ),
        (ALWAYS_ASKS, CHATML_MARKS, {}, f"{turn('same')}{HEAD}⟦same<|im_end|>\n⟧{turn('why')}{HEAD}⟦so<|im_end|>\n⟧"),
        (MARKED, CHATML_MARKS, {}, f"{turn('same')}{HEAD}⟦same<|im_end|>⟧\n{turn('why')}{HEAD}⟦so<|im_end|>⟧\n"),
        (
            MARKED_WITHOUT_END, CHATML_MARKS, {},
            f"{turn('same')}{HEAD}⟦same<|im_end|>⟧\n{turn('why')}{HEAD}⟦so<|im_end|>⟧\n",
        ),
        (
            PHI, PHI_MARKS, {"strips": PHI_MARKS},
            "<|user|>same<|end|><|assistant|>⟦same<|end|>⟧<|user|>why<|end|><|assistant|>⟦so<|end|>⟧",
        ),
    ],
    ids=["chatml", "opens-think", "qwen3", "qwen3-thinking", "nemotron", "deepseek-v3", "deepseek-r1", "deepseek-v3.1",
         "llama3", "mistral", "gpt-oss", "always-asks", "generation", "generation-without-end", "phi"],
)  # fmt: skip
def test_answers_and_their_end_marks_are_in_the_loss(template, marks, settings, expected):
    assert in_loss(template, marks, TWO, **settings) == expected


def test_system_message_goes_where_the_template_puts_it():
    found = in_loss(
        MISTRAL, ["</s>", "<s>", "[INST]", "[/INST]"], chat("a", "b", "c", "d", system="be kind"), bos="<s>"
    )
    assert found == "<s>[INST] a [/INST]⟦ b</s>⟧[INST] be kind\n\nc [/INST]⟦ d</s>⟧"


def test_conversation_that_ends_with_the_user():
    assert in_loss(CHATML, CHATML_MARKS, chat("a", "b", "c")) == f"{turn('a')}{HEAD}⟦b<|im_end|>\n⟧{turn('c')}"


def test_first_answer_without_a_question():
    example = Example((Segment("b", True, "assistant"),))
    assert in_loss(CHATML, CHATML_MARKS, example) == f"{HEAD}⟦b<|im_end|>\n⟧"


def test_reasoning_is_in_the_loss_where_the_template_writes_it():
    """Qwen3 drops the reasoning of earlier turns: what is left of such a turn is not what the model would say."""
    example = chat("a", "<think>\nr1\n</think>\n\nb", "c", "<think>r2</think>d")
    expected = f"{turn('a')}{HEAD}b<|im_end|>\n{turn('c')}{HEAD}⟦<think>\nr2\n</think>\n\nd<|im_end|>\n⟧"
    assert in_loss(QWEN3, CHATML_MARKS, example) == expected
    messages = []
    encode_examples([example], byte_level(CHATML_MARKS, QWEN3), 4096, messages.append)
    assert messages == ["1 assistant turns are not in the loss: the chat template rewrites them"]


def test_reasoning_that_a_template_drops_from_every_turn():
    example = chat("a", "<think>r1</think>b", "c", "<think>r2</think>d")
    found = in_loss(DEEPSEEK, DEEPSEEK_MARKS, example, bos="<｜begin▁of▁sentence｜>")
    assert found == (
        "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>⟦b<｜end▁of▁sentence｜>⟧"
        "<｜User｜>c<｜Assistant｜>⟦d<｜end▁of▁sentence｜>⟧"
    )


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def agent_record(content):
    return {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": content, "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
            {"role": "assistant", "content": "two", "reasoning_content": "easy"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }


@pytest.mark.parametrize("content", [None, "", "let me see"])
def test_tool_calls_and_reasoning_fields_are_in_the_loss(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(json.dumps(agent_record(content)))
    (example,) = load_examples(str(tmp_path / "a.jsonl")).examples
    messages = []
    tokenizer = byte_level(CHATML_MARKS, QWEN3)
    found = bracketed(encode_examples([example], tokenizer, 4096, messages.append), tokenizer)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert found == (
        f"{turn('add')}{HEAD}⟦{content or ''}\n{call}<|im_end|>\n⟧{turn('2', 'tool')}"
        f"{HEAD}⟦<think>\neasy\n</think>\n\ntwo<|im_end|>\n⟧"
    )
    assert messages == [
        "chat field reasoning_content, given 1 times, is written by the chat template",
        "chat field tool_calls, given 1 times, is written by the chat template",
        "chat field tool_call_id, given 1 times, is not used: the chat template does not write it",
        "chat field tools, given 1 times, is not used: the chat template does not write it",
    ]


# How templates of models write calls: Qwen's and GLM's take the arguments as an object, DeepSeek-R1's as text and only
# where there is no content; LFM2's and Granite's omit tool calls; Qwen2.5's splits the content.
OBJECTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if 'x' in m.content %}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for key, value in c.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m['content'] is none %}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (OBJECTS, "⟦<call>add a=1<|im_end|>\n⟧"),
        (OBJECTS + "{{ '' if messages[0].content is none }}", "⟦<call>add a=1<|im_end|>\n⟧"),
        (TEXTS, '⟦<call>add {"a": 1}<|im_end|>\n⟧'),
        (CHATML, "<|im_end|>\n"),
    ],
)
def test_calls_without_text(template, answer, arguments):
    record = agent_record(None)
    record["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    found = in_loss(template, CHATML_MARKS, parse_record(record))
    assert found == f"{turn('add')}{HEAD}{answer}{turn('2', 'tool')}{HEAD}⟦two<|im_end|>\n⟧"


def test_arguments_that_are_not_an_object_stay_as_they_are():
    for arguments in ("not json", "[1]", None):
        call = {"function": {"name": "add", "arguments": arguments}}
        record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
        assert parse_record(record).segments[1].fields["tool_calls"] == [call]


def test_fields_without_a_template_are_reported(tmp_path):
    record = {"messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    messages = []
    encode_examples(load_examples(str(tmp_path / "a.jsonl")).examples, byte_level(CHATML_MARKS), 64, messages.append)
    assert messages == ["chat field name, given 1 times, is not used: the chat template does not write it"]


# --- templates that read like text, a byte a token

ANGLED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops all but the last answer's reasoning, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}[{% if not loop.last %}{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}]"
    "{% endfor %}"
)
LAST_DIFFERS = (
    "{% for m in messages %}{{ m.content }}{{ '.' if loop.last and not add_generation_prompt else '-' }}{% endfor %}"
)
ALTERNATING = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{{ m.content|trim }};{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "example", "text", "mask"),
    [
        (
            ANGLED,
            chat("Hi", "Yo", "Why", "So"),
            "<user>Hi</><assistant>Yo</><user>Why</><assistant>So</>$",
            "_" * 22 + "Yo</>" + "_" * 23 + "So</>$",
        ),
        (ANGLED, chat("Hi", "Yo", "Bye"), "<user>Hi</><assistant>Yo</><user>Bye</>$", "_" * 22 + "Yo</>" + "_" * 13),
        (REWRITING, chat("q", "r|a", "q", "s|b"), "[q][a][q][s|b]$", "_" * 9 + "[s|b]$"),
        (ALTERNATING, chat("same", " same "), "same;same;$", "_____same;$"),
        # How a turn ends changes with what follows: the first answer is found behind its question, not in it.
        (LAST_DIFFERS, chat("a", "a", "b", "c"), "a-a-b-c.$", "__a___c.$"),
    ],
)
def test_unusual_templates(template, example, text, mask):
    tokenizer = ByteTokenizer(chat_template=template)
    assert learned(encode_examples([example], tokenizer, 4096), tokenizer) == (text, mask)


# --- templates that refuse or fail


def test_refused_conversation_is_left_out_and_reported_by_line(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    rows[7]["messages"].insert(0, {"role": "system", "content": "be kind"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    messages = []
    tokenizer = byte_level(CHATML_MARKS, template)
    blocks = encode_examples(load_examples(str(tmp_path / "a.jsonl")).examples, tokenizer, 4096, messages.append)
    assert messages == ["line 8: the chat template refuses it: no system role"]
    text = tokenizer.decode(blocks.input_ids[0])
    assert [f"q{i}" in text for i in range(9)] == [i != 7 for i in range(9)]


def test_long_lists_of_refused_lines_are_shortened():
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('bad') }}{% endif %}" + CHATML
    examples = [chat("good", "a"), *[chat("bad", "b")] * 30]
    messages = []
    encode_examples(examples, byte_level(CHATML_MARKS, template), 64, messages.append)
    assert len(messages) == 11
    assert messages[-1] == "30 conversations are left out in all"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"tool_use": CHATML, "rag": CHATML}, "none of the tokenizer's chat templates is the default: tool_use, rag"),
        ("{{ tools | length }}" + CHATML, "takes none of 3 conversations: line 1: .*TypeError"),
        ("{% for m in messages %}", "takes none of 3 conversations: line 1: .*TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.more }}", "takes none of 3 conversations: line 1: .*UndefinedError"),
        ("{{ raise_exception('not today') }}", "takes none of 3 conversations: line 1: .*not today"),
        ("nothing of what was said", "takes none of 3 conversations: line 1: no assistant turn can be located"),
    ],
)
def test_broken_template_is_a_data_error(template, message):
    examples = [Example(chat("a", "b").segments, place=f"line {line}") for line in (1, 2, 3)]
    with pytest.raises(DataError, match=message):
        encode_examples(examples, byte_level(CHATML_MARKS, template), 64)


def test_template_that_refuses_everything_is_given_up_early():
    examples = [Example(chat("a", "b").segments, place=f"line {line}") for line in range(1, 2000)]
    with pytest.raises(DataError, match="takes none of 1000 conversations"):
        encode_examples(examples, byte_level(CHATML_MARKS, "{{ raise_exception('no') }}"), 64)


# --- long conversations


@pytest.mark.parametrize("template", [None, CHATML, QWEN3, MARKED])
def test_time_and_memory_are_linear_in_the_conversation(template):
    """Four times the messages: about four times the text that is tokenized and rendered, and the memory."""

    def cost(messages):
        tokenizer = ByteTokenizer(chat_template=template)
        example = chat(*(f"message {number} about the light in the garden" for number in range(messages)))
        tracemalloc.start()
        encode_examples([example], tokenizer, 128)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return sum(tokenizer.calls), peak

    small, large = cost(100), cost(400)
    assert large[0] < 5 * small[0]
    assert large[1] < 6 * small[1]


def test_a_conversation_of_2000_messages_takes_seconds():
    tokenizer = byte_level(CHATML_MARKS, CHATML)
    example = chat(*(f"message {number} about the light in the garden and the path" for number in range(2000)))
    started = time.process_time()
    blocks = encode_examples([example], tokenizer, 128)
    assert time.process_time() - started < 20  # 213 s when every prefix was tokenized
    assert (blocks.labels != -100).sum() > 0.3 * blocks.num_tokens


def test_renderings_do_not_grow_with_the_number_of_turns(monkeypatch):
    tokenizer = byte_level(CHATML_MARKS, QWEN3_THINKING)
    rendered = []
    template = ChatTemplate(tokenizer)
    plain = template.render
    monkeypatch.setattr(template, "render", lambda *args, **kwargs: rendered.append(1) or plain(*args, **kwargs))
    counts = []
    for turns in (4, 40):
        rendered.clear()
        template.lay_out(chat(*(f"text {number}" for number in range(turns))))
        counts.append(len(rendered))
    assert counts[0] == counts[1] <= 5


def test_packaged_tokenizer_with_and_without_a_template():
    from edgefed.training.tokenizer import load_tokenizer

    for template, end in ((None, ""), (ANGLED, "</>")):
        tokenizer = load_tokenizer(tiny_model_directory())
        tokenizer.chat_template = template
        blocks = encode_examples([chat("What is it?", "It is a test.")], tokenizer, 512)
        assert "What is it?" in tokenizer.decode(blocks.input_ids[0])
        assert tokenizer.decode(blocks.labels[blocks.labels != -100]) == f"It is a test.{end}<|endoftext|>"
