"""`hybrid eval choices` scores as lm-evaluation-harness does, and the harness runs hybrid."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_items import FORMS, write_items
from tiny_models import STORIES, change_json, write_model

import hybrid
from hybrid import InvalidOption, SamplingParams
from hybrid.evaluation import Fp32Engine, choices, measure_choices, read_questions
from hybrid.evaluation.choices import Answer, answer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra `eval`")
transformers = pytest.importorskip("transformers", reason="the other implementation needs it")

from folded_llama import folded_stories  # noqa: E402
from tokenizers import processors  # noqa: E402

from hybrid.evaluation.harness import HybridLM, generation_options  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # The harness and the packages that it brings warn about their own dependencies.
    pytest.mark.filterwarnings("default"),
]

TASKS = {"hellaswag": "hellaswag", "piqa": "piqa", "arc": "arc_easy"}  # the harness's names


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    """Let the harness's packages use no network, and no folder of the user."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline(tmp_path_factory.mktemp("home")).items():
            patch.setenv(name, value)
        yield


def offline(home: Path) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    return {form: write_items(folder / f"{form}.jsonl", form) for form in FORMS}


@pytest.fixture(scope="module")
def tasks(files, tmp_path_factory):
    """A folder of the harness's own tasks, whose data are our files."""
    folder = tmp_path_factory.mktemp("tasks")
    library = Path(lm_eval.__file__).parent / "tasks"
    for form, name in TASKS.items():
        (original,) = library.glob(f"*/{name}.yaml")
        task = {
            "include": str(original),
            "task": f"our_{form}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(files[form])}},
            "training_split": None,
            "test_split": None,
        }
        (folder / f"our_{form}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def run_harness(lm, tasks: Path) -> dict:
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        lm,
        tasks=[f"our_{form}" for form in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )


def log_likelihoods(results: dict, form: str) -> list[np.ndarray]:
    """Return each question's, in the file's order."""
    samples = sorted(results["samples"][f"our_{form}"], key=lambda sample: sample["doc_id"])
    return [np.array([float(r[0]) for r in sample["filtered_resps"]]) for sample in samples]


def hf_tokenizer(folder: Path):
    """transformers' tokenizer from the same file. It puts BOS before a text if hybrid does.

    Whether a model wants BOS is tested elsewhere (tests/text).
    """
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    has_bos = bool(Fp32Engine(folder).tokenizer.encode(""))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" if has_bos else "$A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["stories", "stories260K"])
def folder(request):
    """The bundled model, and a Llama that nobody here trained."""
    if request.param == "stories":
        return STORIES
    return request.getfixturevalue("shared_data") / "models" / "stories260K" / "hf"


@pytest.fixture(scope="module")
def hf(folder):
    """The harness's own model, in fp32: transformers' LlamaForCausalLM."""
    if folder == STORIES:
        model = folded_stories()
    else:
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return harness_model(model, folder)


def harness_model(model, folder: Path, **options):
    for package in ("accelerate", "peft"):
        pytest.importorskip(package, reason="lm_eval needs it for transformers: the extra `peers`")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=hf_tokenizer(folder), batch_size=1, **options)


@pytest.fixture(scope="module")
def reference(hf, tasks):
    return run_harness(hf, tasks)


@pytest.mark.parametrize("form", FORMS)
def test_accuracy_is_that_of_the_harness_with_transformers(
    form, folder, files, reference, monkeypatch
):
    answers: list[Answer] = []

    def recorded(*arguments):
        answers.append(answer(*arguments))
        return answers[-1]

    monkeypatch.setattr(choices, "answer", recorded)
    questions = read_questions(files[form], form)
    found = measure_choices(Fp32Engine(folder), questions)
    scores = reference["results"][f"our_{form}"]
    assert found.n_questions == 50
    assert found.plain == pytest.approx(scores["acc,none"], abs=1e-12)
    assert found.normalised == pytest.approx(scores["acc_norm,none"], abs=1e-12)
    # At FATReLU's threshold, the last bit of a sum decides whether a neuron is zero.
    tolerance = {"rtol": 0, "atol": 0.1} if folder == STORIES else {"rtol": 1e-5, "atol": 1e-3}
    for question, ours, theirs in zip(
        questions, answers, log_likelihoods(reference, form), strict=True
    ):
        np.testing.assert_allclose(ours.log_likelihoods, theirs, **tolerance)
        assert ours.plain == theirs.argmax()
        lengths = [len(choice) for choice in question.choices]
        assert ours.normalised == (theirs / lengths).argmax()


def test_predictions_are_not_trivial(reference):
    """The test above would prove little if one choice, or the right one, always won."""
    for form in FORMS:
        scores = reference["results"][f"our_{form}"]
        assert 0.2 < scores["acc,none"] < 1.0
        assert len({int(values.argmax()) for values in log_likelihoods(reference, form)}) > 1


@pytest.fixture(scope="module")
def lm():
    return HybridLM("stories", quant="bf16", threads=2)


def test_the_harness_and_our_command_agree_on_one_engine(lm, tasks, files):
    results = run_harness(lm, tasks)
    for form in FORMS:
        questions = read_questions(files[form], form)
        found = measure_choices(lm.engine, questions)
        scores = results["results"][f"our_{form}"]
        assert scores["acc,none"] == pytest.approx(found.plain, abs=1e-12)
        assert scores["acc_norm,none"] == pytest.approx(found.normalised, abs=1e-12)
        with lm.engine.open_session() as session:
            for question, theirs in zip(questions, log_likelihoods(results, form), strict=True):
                assert answer(lm.engine, session, question).log_likelihoods == tuple(theirs)
    assert results["config"]["quant"] == "bf16"
    assert results["config"]["model_hash"] == lm.engine.model_hash


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


STORY = (Path(__file__).parents[1] / "data" / "held_out_story.txt").read_text(encoding="utf-8")
PAIRS = (
    ("Once upon a time, there was a little", " girl named Lily."),
    ("Once upon a time, there was a little", " girl named Tom."),
    ("They were happy. ", "The end."),
    ("", "Once upon a time"),
    ("Sara and Ben went to the", " park"),
    (STORY, " They were happy."),  # longer than the shortened contexts below
)


@pytest.fixture(scope="module")
def hf_stories():
    return harness_model(folded_stories(), STORIES, max_length=128)


@pytest.fixture(scope="module")
def short():
    return HybridLM("stories", quant="bf16", threads=2, context_size=128)


def test_log_likelihoods_are_those_of_transformers(hf_stories, short):
    requests = instances("loglikelihood", *PAIRS)
    theirs, ours = hf_stories.loglikelihood(requests), short.loglikelihood(requests)
    for (expected, is_greedy), (found, found_greedy) in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, rel=0.02, abs=0.1)  # bf16 against fp32
        assert found_greedy == is_greedy
    assert {is_greedy for _, is_greedy in ours} == {True, False}


def test_rolling_log_likelihoods_are_those_of_transformers(short):
    # Without BOS as a part of the text, which the harness would predict, too.
    hf = harness_model(folded_stories(), STORIES, max_length=128, add_bos_token=False)
    requests = instances("loglikelihood_rolling", (STORY,), ("A cat.",), ("",))
    theirs, ours = hf.loglikelihood_rolling(requests), short.loglikelihood_rolling(requests)
    assert len(short.tok_encode(STORY)) > 128  # several windows
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours[2] == 0


@pytest.mark.parametrize(("bos_id", "without"), [(None, 2), (0, 0)])
def test_a_text_without_context_begins_as_the_tokenizer_says(tmp_path, bos_id, without):
    path = write_model(tmp_path / "model", vocab_size=4096) / "config.json"
    change_json(path, bos_token_id=bos_id)
    for options, expected in (({}, 1), ({"add_bos": False}, without)):
        lm = HybridLM(str(path.parent), **options)
        assert lm.prefix_token_id == expected
        lm.engine.close()


def test_answers_are_those_of_transformers(hf_stories, short):
    requests = instances(
        "generate_until",
        ("Once upon a time, there was a little", {"until": ["."], "max_gen_toks": 24}),
        ("Once upon a time", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}),
        (STORY, {"until": [], "max_gen_toks": 4, "temperature": 0.0}),
    )
    theirs, ours = hf_stories.generate_until(requests), short.generate_until(requests)
    # transformers drops the space before a continuation's first word.
    assert [text.removeprefix(" ") for text in ours] == theirs
    assert "." not in ours[0]
    assert all(ours)


def test_sampling_follows_the_seed_of_the_harness(short):
    import random

    request = ("Once upon a time", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})
    texts = []
    for seed in (1, 1, 2):
        random.seed(seed)
        texts.append(short.generate_until(instances("generate_until", request, request)))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_what_hybrid_does_not_have_is_refused(short):
    options = generation_options({"until": "x", "max_gen_toks": 5, "num_beams": 1, "top_k": 3})
    assert (options.max_tokens, options.temperature, options.stop) == (5, 0.0, ("x",))
    with pytest.raises(InvalidOption, match="num_beams=4"):
        generation_options({"num_beams": 4})
    with pytest.raises(InvalidOption, match="unknown option dtype"):
        HybridLM("stories", dtype="float16")
    with pytest.raises(InvalidOption, match="needs a context of more than 128"):
        short.generate_until(instances("generate_until", ("A", {"max_gen_toks": 128})))
    with pytest.raises(InvalidOption, match="no token of its own"):
        short.loglikelihood(instances("loglikelihood", ("A", "")))
    with pytest.raises(InvalidOption, match="apply_chat_template"):
        short.chat_template(True)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7}])
def test_a_repetition_penalty_wins_over_the_models_own(sampling):
    for penalty in (1.0, 1.3):
        options = generation_options({"repetition_penalty": penalty, **sampling})
        assert options.sampling(SamplingParams(repeat_penalty=1.2)).repeat_penalty == penalty
    options = generation_options(dict(sampling))
    assert options.sampling(SamplingParams(repeat_penalty=1.2)).repeat_penalty == 1.2


def test_the_results_say_how_the_model_was_computed(short):
    info = short.get_model_info()
    assert (info["quant"], info["kv"], info["add_bos"]) == ("bf16", "fp16", True)
    lm = HybridLM("stories", kv="bf16", add_bos=False, threads=2)
    assert (lm.get_model_info()["kv"], lm.get_model_info()["add_bos"]) == ("bf16", False)


def run_command(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hybrid.lm_eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | offline(home),
    )


def test_the_documented_command_runs(tasks, files, tmp_path):
    result = run_command(
        *("--model", "hybrid", "--model_args", "pretrained=stories,quant=q8,threads=2"),
        *("--tasks", "our_piqa", "--include_path", str(tasks)),
        *("--output_path", str(tmp_path / "out")),
        home=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(path.read_text())["results"]["our_piqa"]
    with hybrid.load("stories", quant="q8", threads=2) as engine:
        found = measure_choices(engine, read_questions(files["piqa"]))
    assert math.isclose(scores["acc,none"], found.plain)
    assert math.isclose(scores["acc_norm,none"], found.normalised)


def test_the_command_has_help(tmp_path):
    result = run_command("--help", home=tmp_path)
    assert result.returncode == 0
    assert "usage: " in result.stdout


def test_a_mistake_becomes_one_line(tasks, tmp_path):
    result = run_command(
        *("--model", "hybrid", "--model_args", "pretrained=/no/such/model,offline=true"),
        *("--tasks", "our_piqa", "--include_path", str(tasks)),
        home=tmp_path,
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("hybrid.lm_eval: ")
    assert "Traceback" not in result.stderr
