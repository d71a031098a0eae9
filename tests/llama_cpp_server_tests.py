"""Run the tests that llama.cpp wrote for its own server against hybrid's.

    python tests/llama_cpp_server_tests.py

They are in the source distribution of llama-cpp-python, which this downloads (80 MB), and need the
packages openai, requests, wget, filelock and pytest. What fails is listed by reason: most tests
know the texts of llama.cpp's test model, or want its own endpoints.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import xml.etree.ElementTree as xml
from pathlib import Path

VERSION = "0.3.36"
INDEX = "https://pypi.org/simple/llama-cpp-python/"
INNER = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/tools/server/tests/"
KEY = "sk-this-is-the-secret-key"  # that test_security.py sends
FILES = (
    *("chat_completion", "completion", "tokenize", "metrics", "tool_call", "basic"),
    *("compat_oai_responses", "compat_anthropic", "security"),
)
# The first expression that a failure's name or text matches says why it fails.
REASONS = (
    (r"test_completion|test_metrics.*(predict|rate|timings|cached)", "llama.cpp's /completion"),
    (r"'content' in \{'id': 'cmpl", "llama.cpp's /completions, which is not OpenAI's"),
    (r"test_cors|cors_proxy", "reflects origins by default; here a site must be allowed by name"),
    (r"image|vision|media|truck", "images"),
    (r"__verbose", "debug output"),
    (r"progress|telemetry", "progress of prompts in a stream"),
    (r"test_apply_chat_template|test_server_props", "its own template or file"),
    (r"test_(metrics_disabled|server_slots|no_ui|server_multiple|load_split|.*aliases)", "options"),
    (r"test_metrics", "llama.cpp's names of metrics"),
    (r"thinking", "templates with thinking; this model has none"),
    (r"input_tokens|token_count", "an endpoint that counts tokens"),
    (r"sw\.js", "files of llama.cpp's page"),
    (r"empty_messages", "a chat without messages, which is refused here"),
    (r"n_ctx|context_size", "a context that is divided among sequences; here each has all of it"),
    (
        r"(tiny)?llama|stories|Sudden|\d+ == \d+|match_regex|False",
        "texts of llama.cpp's test model",
    ),
)


def fetch(folder: Path) -> Path:
    """Download the tests. Return their folder."""
    with urllib.request.urlopen(INDEX, timeout=60) as answer:
        page = answer.read().decode()
    (address,) = re.findall(rf'href="([^"#]+-{re.escape(VERSION)}\.tar\.gz)', page)
    archive, _ = urllib.request.urlretrieve(address)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(INNER) and member.isfile():
                target = folder / member.name.removeprefix(INNER)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    Path(archive).unlink()
    return folder


def serve(*options: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server with the bundled model. Return it and its port."""
    command = [sys.executable, "-m", "hybrid.serve", "--port", "0", "-np", "2", *options]
    command += ["--chat-template", "minicpm"]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )
    assert server.stderr is not None
    return server, server.stderr.readline().strip().rpartition(":")[2]


def run(tests: Path, files: list[str], port: str) -> list[tuple[str, str | None]]:
    """Return the names of the tests that ran, and how each failed; None: it passed."""
    report = tests / "report.xml"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "--tb=short",
            f"--junitxml={report}",
        ]
        + [f"unit/test_{name}.py" for name in files],
        cwd=tests,
        env=os.environ | {"DEBUG_EXTERNAL": "1", "PORT": port},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    found = []
    for case in xml.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("skipped") is None:
            failure = case.find("failure")
            failure = case.find("error") if failure is None else failure
            text = None if failure is None else f"{failure.get('message')} {failure.text}"
            found.append((name, text))
    return found


def reason(name: str, text: str) -> str:
    for pattern, why in REASONS:
        if re.search(pattern, name) or re.search(pattern, text[:400]):
            return why
    return "?"


def main() -> None:
    outcomes: list[tuple[str, str | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch(Path(folder))
        for files, variables in ((FILES[:-1], {}), (FILES[-1:], {"HYBRID_API_KEY": KEY})):
            server, port = serve(**variables)
            try:
                outcomes += run(tests, list(files), port)
            finally:
                server.terminate()
                server.wait()
    passed = [name for name, text in outcomes if text is None]
    print(f"{len(passed)} of {len(outcomes)} tests pass; by file:")
    files = collections.Counter(name.partition("::")[0] for name, _ in outcomes)
    right = collections.Counter(name.partition("::")[0] for name in passed)
    for name, n in sorted(files.items()):
        print(f"  {name:28} {right[name]:3} of {n}")
    print("what fails, by reason:")
    why: dict[str, list[str]] = collections.defaultdict(list)
    for name, text in outcomes:
        if text is not None:
            why[reason(name, text)].append(name)
    for what, names in sorted(why.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):3} {what}")
        for name in names if what == "?" else ():
            print("       ", name)


if __name__ == "__main__":
    main()
