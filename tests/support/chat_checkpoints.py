"""Checkpoints with chat templates, made here: three kinds of tokenizers, four shapes of templates."""

import json

LLAMA_3 = """\
{% for message in messages %}
{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim %}
{{ (bos_token if loop.first else '') + turn + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{ ' ' + message.content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message.role + '|>\n' + message.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# The template, its tokens beyond <s> and </s>, and the one that ends a turn.
SHAPES = {
    "llama-3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], "</s>"),
    "zephyr": (ZEPHYR, [], "</s>"),
}
CORPUS = [
    "the fern is green", "water the fern twice a week", "user assistant system", "  two  spaces\n\nand a\ttab",
    "[INST] is the lamp warm [/INST]", "<|user|>\nrice needs water",
] * 20  # fmt: skip
BACKENDS = ("bytes", "metaspace", "sentencepiece")


def added(start, names, **flags):
    return {str(start + i): {"content": name, "special": True} | flags for i, name in enumerate(names)}


def theirs(folder, backend):
    """transformers' tokenizer."""
    import transformers  # here, because not every Python has it: tests that ask for this say so

    kind = transformers.LlamaTokenizer if backend == "sentencepiece" else transformers.PreTrainedTokenizerFast
    return kind.from_pretrained(folder)


def their_ids(tokenizer, prompt, history=()):
    texts = [*(text for exchange in history for text in exchange), prompt]
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def write_config(folder, config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
