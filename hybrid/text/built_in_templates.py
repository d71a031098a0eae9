"""Chat templates for models that ship none, by the names that the field gives their formats.

Each follows the format that its models were trained on, as their authors describe it.
"""

from __future__ import annotations

from typing import NamedTuple


class BuiltIn(NamedTuple):
    source: str
    tokens: tuple[str, ...] = ()  # which the vocabulary of a model of this format has


def _each(begin: str, end: str, answer: str) -> str:
    """Return a template that writes every message between `begin`, with its role, and `end`."""
    return (
        "{%- for message in messages -%}"
        + begin.replace("ROLE", "{{ message['role'] }}")
        + "{{ message['content'] }}"
        + end
        + "{%- endfor -%}{%- if add_generation_prompt -%}"
        + answer
        + "{%- endif -%}"
    )


_ALTERNATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 is even) "
    "or message['role'] not in ['user', 'assistant'] -%}"
    "{{- raise_exception('the roles user and assistant must alternate, after one system message "
    "at most') -}}{%- endif -%}"
)

BUILT_IN: dict[str, BuiltIn] = {
    "minicpm": BuiltIn(
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        "{{ '<用户>' + message['content'].strip() + '<AI>' }}"
        "{%- else -%}{{ message['content'].strip() }}{%- endif -%}{%- endfor -%}"
    ),
    "chatml": BuiltIn(
        _each(
            "{{ '<|im_start|>' }}ROLE{{ '\\n' }}",
            "{{ '<|im_end|>\\n' }}",
            "{{ '<|im_start|>assistant\\n' }}",
        ),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama-2": BuiltIn(
        _ALTERNATE + "{%- if message['role'] == 'user' -%}"
        "{{ bos_token + '[INST] ' }}{%- if loop.first and system -%}"
        "{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
        "{{ message['content'].strip() + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif -%}"
        "{%- endfor -%}"
    ),
    "llama-3": BuiltIn(
        "{{ bos_token }}"
        + _each(
            "{{ '<|start_header_id|>' }}ROLE{{ '<|end_header_id|>\\n\\n' }}",
            "{{ '<|eot_id|>' }}",
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": BuiltIn(
        "{{ bos_token }}" + _ALTERNATE + "{%- if message['role'] == 'user' -%}"
        "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') "
        "+ message['content'] + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + message['content'].strip() + eos_token }}{%- endif -%}{%- endfor -%}"
    ),
    "zephyr": BuiltIn(
        _each("{{ '<|' }}ROLE{{ '|>\\n' }}", "{{ eos_token + '\\n' }}", "{{ '<|assistant|>\\n' }}")
    ),
    "gemma": BuiltIn(
        "{{ bos_token }}" + _ALTERNATE + "{{ '<start_of_turn>' "
        "+ ('user' if message['role'] == 'user' else 'model') + '\\n' }}"
        "{{ (system + '\\n\\n' if loop.first and system else '') + message['content'].strip() "
        "+ '<end_of_turn>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi-3": BuiltIn(
        _each("{{ '<|' }}ROLE{{ '|>\\n' }}", "{{ '<|end|>\\n' }}", "{{ '<|assistant|>\\n' }}"),
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "vicuna": BuiltIn(
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{ message['content'] + ' ' }}"
        "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}"
        "{%- else -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    ),
    "alpaca": BuiltIn(
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\\n\\n' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'user' -%}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{%- else -%}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
}
