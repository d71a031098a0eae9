"""Chat templates of well-known shapes, written for the tests, and conversations for them."""

from __future__ import annotations

import random
from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TEMPLATES = {
    "minicpm": (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<用户>' + m.content.strip() + '<AI>' }}"
        "{% else %}{{ m['content'].strip() }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{%- for m in messages %}\n"
        "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate, and the user speaks first') }}{% endif %}"
        "{% if loop.first and system %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set text = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}\n"
        "{% if m['role'] == 'user' %}\n{{ '<|user|>\\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\\n' + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant roles are supported') }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "vicuna": (
        "{%- set ns = namespace(system='A chat between a user and an assistant.') -%}"
        "{%- for m in messages if m.role == 'system' -%}{%- set ns.system = m.content -%}"
        "{%- endfor -%}{{ ns.system }}"
        "{%- for m in messages if m.role != 'system' -%}"
        "{{ ' USER: ' ~ m.content if m.role == 'user' "
        "else ' ASSISTANT: ' ~ m.content ~ eos_token }}"
        "{%- endfor -%}{{ ' ASSISTANT:' if add_generation_prompt }}"
    ),
    "thinking": (
        "{%- for m in messages %}"
        "{%- set text = m.content if m.content is string else m.content[0].text %}"
        "{%- if m.role == 'assistant' and '</think>' in text %}"
        "{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    ),
    "tools": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
        "{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}"
        "{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}"
        "{%- elif messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
        "{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{{- '<|im_start|>user\\n<tool_response>\\n' + m.content }}"
        "{{- '\\n</tool_response><|im_end|>\\n' }}"
        "{%- elif m.role == 'user' or (m.role == 'system' and not loop.first) "
        "or (m.role == 'assistant' and not m.tool_calls) %}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
        "{%- for call in m.tool_calls %}{%- set call = call.function or call %}"
        '{{- \'\\n<tool_call>\\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
        "{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "macros": (
        "{%- macro say(role, parts) -%}{%- generation -%}[{{ role | upper }}]"
        "{%- for part in parts -%}{{ ' ' if not loop.first }}{{ part }}"
        "{%- if loop.index > 40 -%}{%- break -%}{%- endif -%}{%- endfor -%}[/{{ role | upper }}]"
        "{%- endgeneration -%}{%- endmacro -%}"
        "{%- for m in messages -%}{{ say(m.role, m.content.split()) }}{%- endfor -%}"
        "{{- '[ASSISTANT]' if add_generation_prompt }}"
    ),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how warm it is. 说天气 <b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

_WORDS = [
    "Hello",
    "a < b",
    "naïve",
    "你好",
    "  spaced  ",
    "line\nbreak",
    "{{ x }}",
    "100 %",
    "🙂",
    "\t",
]


def conversation(seed: int) -> list[dict[str, Any]]:
    """Return a random conversation without the text of a marker; the user speaks last."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(1, 8)))

    messages = [{"role": "system", "content": text()}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(0, 4)):
        messages.append({"role": "user", "content": text()})
        messages.append({"role": "assistant", "content": text()})
    return [*messages, {"role": "user", "content": text()}]
