"""Exports fine-tuned with the tools that people use: a model that is told to stop learns it."""

import itertools
import json
import random

import pytest
import torch
import transformers

from stem_jax import export
from stem_jax.data.facts import FACT_TEMPLATES, RELATIONS, read_facts
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.evaluation.recall import fact_prompt
from stem_jax.training.state import init_state
from tests.facts_model import COUNTRIES, export_into
from tests.saved_models import SIZES, save_run

STEPS, BATCH, QUESTIONS, NEW_TOKENS = 50, 16, 50, 16
VALUE = {"value.layers": (0, 2), "model.num_kv_heads": 2}
PER_LAYER = {"per_layer.layers": (1, 2), "per_layer.width": 20}
NONE = {"model.stem_layers": "none"}
MEMORIES = {
    "stem value per_layer": VALUE | PER_LAYER,
    "value": VALUE | NONE,
    "per_layer": PER_LAYER | NONE,
}
# Of these no question is asked in training.
HELD_OUT = COUNTRIES[:4]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model is slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def facts_export(tmp_path_factory):
    """The committed model, imported and exported anew."""
    return export_into(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def dense_export(facts_export, train_step, tmp_path_factory):
    """An untrained dense model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = load_tokenizer_folder(facts_export / "native_tokenizer")
    step = train_step(**{**SIZES, "model.stem_layers": "none", "model.vocab_size": 704})
    state = init_state(step.blueprint)
    save_run(folder / "run", step, state, tokenizer)
    export.main([f"--workdir={folder / 'run'}", f"--out={folder / 'out'}", "--format=hf"])
    return folder / "out"


@pytest.fixture(scope="module", params=MEMORIES)
def memories_export(request, train_step, tmp_path_factory):
    """An untrained model that reads other memories than STEM's, or three, a byte a token."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    step = train_step(**{**SIZES, **MEMORIES[request.param]})
    save_run(folder / "run", step, init_state(step.blueprint))
    export.main([f"--workdir={folder / 'run'}", f"--out={folder / 'out'}", "--format=hf"])
    return folder / "out"


def _pairs(countries):
    """Questions, and answers that end the sentence, in an order of their own."""
    facts = [fact for fact in read_facts() if fact.country in countries]
    pairs = [
        (fact_prompt(template, fact.country), f" {getattr(fact, relation)}.")
        for fact in facts
        for relation in RELATIONS
        for template in FACT_TEMPLATES[relation]
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def _load(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return tokenizer, model.float()


def _share_that_stops(model, tokenizer):
    """Of held-out prompts, those whose completion is the answer and eos, and nothing between."""
    model.eval()
    asked = _pairs(HELD_OUT)[:QUESTIONS]
    stopped = 0
    for prompt, answer in asked:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        ended = new[-1] == tokenizer.eos_token_id
        stopped += ended and tokenizer.decode(new[:-1]) == answer
    return stopped / len(asked)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["as exported", "as exported before", "not tuned"])
def test_a_model_tuned_to_stop_stops(kind, facts_export, tmp_path):
    tokenizer, model = _load(facts_export)
    if kind == "as exported before":
        # What earlier versions wrote into tokenizer_config.json.
        tokenizer.split_special_tokens = True
        tokenizer.pad_token = tokenizer.eos_token
    texts = [question + answer + tokenizer.eos_token for question, answer in _pairs(COUNTRIES[4:])]
    examples = [tokenizer(text) for text in texts]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    labels = collator(examples[:BATCH])["labels"]
    are_labels = (labels == tokenizer.eos_token_id).sum(-1)
    assert (are_labels == (kind != "as exported before")).all()
    if kind != "not tuned":
        args = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=examples, data_collator=collator
        )
        assert trainer.train().global_step == STEPS
    share = _share_that_stops(model, tokenizer)
    print(f"\n{kind}: {share:.0%} of {QUESTIONS} prompts stop right after the answer")
    assert share >= 0.95 if kind == "as exported" else share <= 0.2


_SIMPLE = {"bf16": False, "activation_checkpointing": False}
_LORA = {
    "bf16": False,
    "learning_rate": 0.02,
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}


def _sft_trainer(folder, tmp_path, countries=COUNTRIES, number=256, **options):
    """SFTTrainer of TRL, on questions and answers, which ends each with eos."""
    import datasets
    import peft
    import trl

    adapters = options.pop("lora", None)
    tokenizer, model = _load(folder)
    pairs = [{"prompt": question, "completion": answer} for question, answer in _pairs(countries)]
    args = trl.SFTConfig(
        **{
            "output_dir": str(tmp_path),
            "max_steps": 10,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )
    data = datasets.Dataset.from_list(pairs[:number])
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=None if adapters is None else peft.LoraConfig(**adapters),
    )
    return trainer, tokenizer


@pytest.mark.long
@pytest.mark.parametrize("name", ["dense_export", "facts_export"])
def test_tokens_of_trl(name, request, tmp_path):
    trainer, tokenizer = _sft_trainer(request.getfixturevalue(name), tmp_path, **_SIMPLE)
    ours = load_tokenizer_folder(request.getfixturevalue(name) / "native_tokenizer")
    for example in trainer.train_dataset:
        text = example["prompt"] + example["completion"].removesuffix(tokenizer.eos_token)
        assert example["input_ids"] == [ours.bos_id, *ours.encode(text), ours.eos_id]
        assert example["labels"][-1] == ours.eos_id
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
    assert ((batch["labels"] == ours.eos_id).sum(-1) == 1).all()
    assert (batch["input_ids"] == tokenizer.pad_token_id).any()


@pytest.mark.long
def test_packed_and_checkpointed_by_trl(facts_export, tmp_path):
    """As `test_a_model_tuned_to_stop_stops`; rows are of several documents, which are alone."""
    trainer, tokenizer = _sft_trainer(
        facts_export,
        tmp_path,
        COUNTRIES[4:],
        None,
        max_steps=STEPS,
        learning_rate=2e-3,
        packing=True,
        max_length=64,
        activation_checkpointing=True,
        bf16=False,
    )
    rows = [trainer.train_dataset[n] for n in range(len(trainer.train_dataset))]
    assert sum(len(row["seq_lengths"]) for row in rows) > 2 * len(rows)
    batch = trainer.data_collator(rows[:2])
    assert "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() == sum(len(r["seq_lengths"]) for r in rows[:2])
    calls = []
    hook = trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert trainer.train().global_step == STEPS
    hook.remove()
    assert len(calls) == 2 * STEPS
    share = _share_that_stops(trainer.model, tokenizer)
    print(f"\n{share:.0%} of {QUESTIONS} prompts stop right after the answer")
    assert share >= 0.95


# Of names that TRL and transformers have of each other.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.long
@pytest.mark.parametrize("options", [_SIMPLE, {}])
@pytest.mark.parametrize("name", ["dense_export", "facts_export"])
def test_trl_trains(name, options, request, tmp_path):
    """Also with TRL's defaults."""
    _check_it_learns(_sft_trainer(request.getfixturevalue(name), tmp_path, **options)[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.long
@pytest.mark.parametrize("options", [_SIMPLE, {}, _LORA], ids=["simple", "defaults", "lora"])
def test_trl_trains_memories(options, memories_export, tmp_path):
    # With adapters embedding and head stay untrained.
    share = 0.9 if options is _LORA else 0.7
    _check_it_learns(_sft_trainer(memories_export, tmp_path, **options)[0], share)


def _check_it_learns(trainer, share=0.7):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < share * losses[0], json.dumps(losses)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.long
def test_packed_rows_and_checkpoints_of_memories(memories_export, tmp_path):
    """Rows of the collator: loss and gradients are those of documents alone, all kept."""
    options = {"packing": True, "max_length": 128, "activation_checkpointing": True, "bf16": False}
    trainer, _ = _sft_trainer(memories_export, tmp_path, **options)
    rows = [trainer.train_dataset[n] for n in range(2)]
    assert all(len(row["seq_lengths"]) > 1 for row in rows)
    batch = trainer.data_collator(rows)
    assert "attention_mask" not in batch
    model, calls = trainer.model, []
    # In layer 1 all models have the same one.
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _check_it_learns(trainer)
    hook.remove()
    assert len(calls) == 20
    packed = _loss_and_gradients(model, [batch])
    model.gradient_checkpointing_disable()
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), None]
    documents = [
        {name: batch[name][:, slice(*ends)] for name in ("input_ids", "labels")}
        for ends in itertools.pairwise(starts)
    ]
    assert len(documents) == sum(len(row["seq_lengths"]) for row in rows)
    for found, expected in zip(packed, _loss_and_gradients(model, documents), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def _loss_and_gradients(model, batches):
    """Of all labels, whatever batch they are in."""
    model.zero_grad()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = 0
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += loss.detach()
    return [total, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.long
def test_trainer_trains_memories(memories_export, tmp_path):
    """Also resumed from what it saved."""
    tokenizer, model = _load(memories_export)
    texts = [q + a + tokenizer.eos_token for q, a in _pairs(COUNTRIES)[:64]]
    losses = []
    for steps in (6, 12):
        args = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=6,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=args,
            train_dataset=[tokenizer(text) for text in texts],
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train(resume_from_checkpoint=steps > 6)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model = _load(memories_export)[1]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0], json.dumps(losses)
