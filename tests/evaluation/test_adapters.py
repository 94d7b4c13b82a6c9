"""Other harnesses reach the model through their own interface: lmms-eval's real package, VLMEvalKit's by a stand-in."""

import json
import sys
import types

import numpy as np
import pytest

from evaluation.adapters import prompt_of, vlmevalkit
from tests.helpers.official_files import picture
from vlgpt.document import ImagePart, TextPart
from vlgpt.errors import UserError


class Recorder:
    """Answers with what it was asked."""

    identity = types.MappingProxyType({"kind": "recorder"})

    def __init__(self):
        self.calls = []

    def generate(self, prompts, decoding):
        self.calls.append((len(prompts), decoding))
        return [f" {p.document.parts[-1].role}:{len(p.images)}:{p.document.text} " for p in prompts]

    def rank(self, prompt, candidates, *, normalise):
        return np.array([-float(len(text)) for text in candidates])


def test_pictures_and_texts_become_one_turn_in_reading_order():
    prompt = prompt_of(["What ", picture(0), "", "is this?", picture(1)], is_chat=True, id="x")
    assert prompt.document.parts == (
        TextPart("What", "user"), ImagePart(0, "user"), TextPart("is this?", "user"), ImagePart(1, "user")
    )  # fmt: skip
    assert prompt_of(["go on"], is_chat=False, id="x").document.parts == (TextPart("go on", "plain"),)


def request(kind, arguments):
    from lmms_eval.api.instance import Instance

    return Instance(
        request_type=kind, arguments=arguments, idx=0, metadata={"task": "t", "doc_id": 0, "repeats": 1}
    )


@pytest.fixture
def lmms_model():
    pytest.importorskip("lmms_eval")
    from evaluation.adapters.lmms_model import VlGptLmms

    model = VlGptLmms(responder=Recorder(), batch_size="2")
    model.task_dict = {"t": {"test": [{"image": picture(i), "answer": "no"} for i in range(5)]}}
    return model


def test_lmms_eval_registers_the_manifest_and_builds_the_class():
    pytest.importorskip("lmms_eval")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from evaluation.adapters.lmms_eval import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    cls = registry.get_model_class("vl_gpt")
    assert cls.__name__ == "VlGptLmms" and registry.resolve("vl-gpt").model_id == "vlgpt"
    with pytest.raises(UserError, match="export=FOLDER"):
        cls.create_from_arg_string("prompts=vlgpt", {"batch_size": 1, "device": "cpu"})
    with pytest.raises(UserError, match="does not know the model_args \\['colour'\\]"):
        cls.create_from_arg_string("export=x,colour=red", {"batch_size": 1})


def test_lmms_eval_requests_are_answered_in_order_and_in_batches(lmms_model):
    def visual(document):
        return [document["image"]]

    greedy = {"max_new_tokens": 16, "temperature": 0, "until": ["\n\n"]}
    requests = [
        request(
            "generate_until", (f"What is {i}?", {**greedy, "num_beams": 1 + i % 2}, visual, i, "t", "test")
        )
        for i in range(5)
    ]
    assert lmms_model.generate_until(requests) == [f"user:1:What is {i}?" for i in range(5)]
    calls = lmms_model.responder.calls
    assert sorted((n, d.num_beams) for n, d in calls) == [(1, 1), (2, 1), (2, 2)]
    assert calls[0][1].max_new_tokens == 16 and calls[0][1].stop == ("\n\n",) and calls[0][1].temperature == 0


def test_lmms_eval_likelihoods_take_texts_or_functions_of_the_document(lmms_model):
    requests = [
        request("loglikelihood", ("q", "yes!", lambda d: [d["image"]], 0, "t", "test")),
        request("loglikelihood", ("q", lambda d: d["answer"], lambda d: None, 0, "t", "test")),
        request("loglikelihood", ("q", "user:0:q", None, 0, "t", "test")),
    ]
    assert lmms_model.loglikelihood(requests) == [(-4.0, False), (-2.0, False), (-8.0, True)]


def test_lmms_eval_sampling_settings_are_translated(lmms_model):
    from evaluation.adapters.lmms_model import decoding_of

    assert decoding_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9}).temperature == 0.7
    assert decoding_of({"do_sample": False, "temperature": None, "until": None}).temperature == 0
    assert decoding_of({"until": "stop"}).stop == ("stop",)


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """A stand-in for VLMEvalKit: its module names, its base class's form, and a run.py that asks one question."""
    picture(0).save(tmp_path / "a.png")
    package = tmp_path / "kit/vlmeval"
    (package / "vlm").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "config.py").write_text("supported_VLM = {}\n")
    (package / "vlm/__init__.py").touch()
    (package / "vlm/base.py").write_text(
        "class BaseModel:\n    INTERLEAVE = False\n    def __init__(self):\n        pass\n"
    )
    (tmp_path / "kit/run.py").write_text(
        "import json, sys\nfrom vlmeval.config import supported_VLM\n"
        "model = supported_VLM[sys.argv[2]]()\n"
        f"message = [dict(type='image', value={str(tmp_path / 'a.png')!r}), dict(type='text', value='Is it red?')]\n"
        f"out = dict(argv=sys.argv[1:], interleave=model.INTERLEAVE, reply=model.generate_inner(message, 'GQA'))\n"
        f"json.dump(out, open({str(tmp_path / 'out.json')!r}, 'w'))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["x"])
    yield tmp_path
    for name in [name for name in sys.modules if name == "vlmeval" or name.startswith("vlmeval.")]:
        del sys.modules[name]


def test_the_vlmevalkit_launcher_adds_the_model_and_runs_the_kit(kit, monkeypatch):
    recorder = Recorder()
    loader = types.SimpleNamespace(load=lambda *args, **kwargs: recorder)
    monkeypatch.setattr(vlmevalkit, "ModelResponder", loader)
    arguments = ["--kit", str(kit / "kit"), "--model", "export", "--", "--data", "GQA_TestDev_Balanced"]
    assert vlmevalkit.main(arguments) == 0
    out = json.loads((kit / "out.json").read_text())
    assert out["reply"] == "user:1:Is it red?" and out["interleave"] is True
    assert out["argv"] == ["--model", "VL-GPT", "--data", "GQA_TestDev_Balanced"]


def test_the_vlmevalkit_launcher_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"run\.py not found"):
        vlmevalkit.main(["--kit", str(tmp_path), "--model", "x"])
    with pytest.raises(UserError, match="VLMEvalKit cannot be imported"):
        vlmevalkit.register("x")


def test_vlmevalkit_messages_of_other_kinds_are_refused(kit):
    model = vlmevalkit.model_class(object)(responder=Recorder())
    with pytest.raises(UserError, match="sent 'video'"):
        model.generate_inner([{"type": "video", "value": "x"}])
