"""Hugging Face transformers and PEFT on compact models: they work, or raise and say what to do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import sparse_comm
from sparse_comm.compact import link
from tests.compact.uses import MODES, Pair, mask_, mask_like, noise, pair, refused, same

pytestmark = MODES

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def gpt2() -> nn.Module:
    """Tied embeddings, and Conv1D layers, whose weights are transposed."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    ).eval()


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=8,
            use_cache=False,
        )
    ).eval()


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
            use_cache=False,
        )
    ).eval()


MODELS = pytest.mark.parametrize("make", [gpt2, bert, llama])


def of(make, weights: str, **options) -> Pair:
    return pair(make, weights, TOKENS, **options)


@MODELS
def test_models_compute_and_learn_as_when_masked(weights, make):
    both = of(make, weights)
    both.check()
    twin = copy.deepcopy(both.compact)
    Pair(twin, both.dense, both.masks, both.inputs).check()


@MODELS
@pytest.mark.parametrize("given", [False, True])
def test_save_pretrained_writes_what_the_dense_model_would(weights, make, given, tmp_path):
    both = of(make, weights)
    with torch.no_grad():
        both.use(lambda m: [p.mul_(1.5) for p in m.parameters()])
    options = {"state_dict": both.compact.state_dict()} if given else {}
    both.compact.save_pretrained(tmp_path, **options)
    loaded, info = type(both.dense).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in both.dense.state_dict().items():
        same(loaded.state_dict()[name], tensor)
    same(loaded(TOKENS).logits, both.dense(TOKENS).logits)
    tied = make is not llama
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    both.check()


def test_save_pretrained_of_a_model_inside_another_writes_the_dense_model(weights, tmp_path):
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = gpt2()
            self.head = nn.Linear(50, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x).logits)

    both = of(Classifier, weights)
    both.compact.backbone.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    same(loaded(TOKENS).logits, both.dense.backbone(TOKENS).logits)
    both.check()


@MODELS
def test_tie_weights_changes_nothing(weights, make):
    both = of(make, weights)
    both.each(lambda m: m.tie_weights())
    both.check()
    if make is not llama:
        embedding, head = both.compact.get_input_embeddings(), both.compact.get_output_embeddings()
        assert embedding._parameters["weight"] is head._parameters["weight"]


@MODELS
def test_resizing_compact_embeddings_raises(weights, make):
    both = of(make, weights)
    both.each(lambda m: m.resize_token_embeddings(50))  # the size that they have
    for use in (
        lambda m: m.resize_token_embeddings(60),
        lambda m: m.resize_token_embeddings(pad_to_multiple_of=64),
    ):
        with refused(both, RuntimeError, "sparse_comm.densify(model)", "masks of the new shape"):
            use(both.compact)
    assert both.compact.config.vocab_size == 50


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_resizing_one_compact_embedding_of_two_raises(weights, name):
    both = of(llama, weights, masks={name: mask_like(noise(50, 16))})
    with refused(both, RuntimeError, f"'{name}'", "sparse_comm.densify(model)"):
        both.compact.resize_token_embeddings(60)


def test_resizing_dense_embeddings_of_a_compact_model_works(weights):
    both = of(llama, weights, masks={"model.layers.0.mlp.up_proj.weight": mask_like(noise(24, 16))})
    both.each(lambda m: m.resize_token_embeddings(60))
    assert both.compact(TOKENS).logits.shape == (2, 5, 60)
    both.check()


def test_initialisers_of_the_model_take_effect(weights):
    both = of(bert, weights)
    for module in (both.compact, both.dense):
        for parameter in module.parameters():
            parameter.__dict__.pop("_is_hf_initialized", None)
    both.use(lambda m: m.apply(m._init_weights))
    both.check()


def test_gradient_checkpointing_works(weights):
    both = of(llama, weights)
    both.each(lambda m: m.train())
    both.each(lambda m: m.gradient_checkpointing_enable())
    both.check()


# ---------------------------------------------------------------- PEFT


def lora(module: nn.Module, **options) -> PeftModel:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options
    )
    torch.manual_seed(3)
    return get_peft_model(module, config)


def test_lora_on_a_compact_model_trains_as_on_the_masked_one(weights, tmp_path):
    both = of(llama, weights)
    values = both.values("lm_head.weight").detach().clone()
    ours, theirs = both.each(lora)
    for _ in range(2):
        for model in (ours, theirs):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same(ours(TOKENS).logits, theirs(TOKENS).logits)
    for (name, a), (other, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other
        assert a.requires_grad == b.requires_grad == ("lora_" in name)
        if "lora_" in name:
            same(a, b)
    same(ours.get_base_model().lm_head._parameters["weight"], values)
    ours.save_pretrained(tmp_path)
    same(PeftModel.from_pretrained(llama_of(theirs), tmp_path)(TOKENS).logits, ours(TOKENS).logits)


def llama_of(model: PeftModel) -> nn.Module:
    """A plain model of the dense base weights under the adapters."""
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("safe", [False, True])
def test_merging_lora_takes_effect_where_unpruned_and_warns(weights, safe, monkeypatch):
    both = of(llama, weights)
    ours, theirs = both.each(lora)
    monkeypatch.setattr(link, "_warned_dropped", False)
    with pytest.warns(UserWarning, match="non-zero entries where it is pruned; they stay zero"):
        merged = ours.merge_and_unload(safe_merge=safe)
    assert sparse_comm.is_compact(merged)
    dense = theirs.merge_and_unload(safe_merge=safe)
    mask_(dense, both.masks)
    Pair(merged, dense, both.masks, both.inputs).check()


def test_unmerging_lora_gives_the_weights_back(weights):
    both = of(llama, weights)
    ours = lora(both.compact)
    before = ours(TOKENS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.merge_adapter()
        ours.unmerge_adapter()
    same(ours(TOKENS).logits, before, exact=False)


def test_modules_to_save_train_and_load_into_a_model_of_the_same_masks(weights, tmp_path):
    both = of(llama, weights)
    fresh = copy.deepcopy(both.compact)
    ours, theirs = both.each(lambda m: lora(m, modules_to_save=["lm_head"]))
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    mask_(theirs, {head: both.masks["lm_head.weight"]})
    same(ours(TOKENS).logits, theirs(TOKENS).logits)
    ours.save_pretrained(tmp_path)
    same(PeftModel.from_pretrained(fresh, tmp_path)(TOKENS).logits, ours(TOKENS).logits)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), tmp_path)


# ---------------------------------------------------------------- Trainer


def trainer(model: nn.Module, folder, **options) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        weight_decay=0.1,
        learning_rate=0.01,
        max_steps=2,
        per_device_train_batch_size=2,
        max_grad_norm=0,  # the dense model's norm would count pruned entries
        **options,
    )
    return Trainer(model, arguments, train_dataset=data)


@MODELS
def test_the_trainer_decays_the_same_parameters(weights, make, tmp_path):
    """It goes by names and module types, not by p.dim() >= 2."""
    both = of(make, weights)
    ours, theirs = both.each(lambda m: trainer(m, tmp_path))
    names = ours.get_decay_parameter_names(both.compact)
    assert sorted(names) == sorted(theirs.get_decay_parameter_names(both.dense))
    decayed = {id(p) for p in ours.create_optimizer().param_groups[0]["params"]}
    assert ours.optimizer.param_groups[0]["weight_decay"] == 0.1
    for name in both.masks:
        if name in dict(both.compact.named_parameters()):
            assert (id(both.values(name)) in decayed) == (name in names)


def test_the_trainer_trains_decays_saves_and_resumes(weights, tmp_path):
    both = of(llama, weights)

    optimizers = both.each(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1))
    optimizers[1].register_step_pre_hook(lambda *_: mask_gradients(both))
    for module, optimizer, folder in zip(
        (both.compact, both.dense), optimizers, ("compact", "dense"), strict=True
    ):
        run = trainer(module, tmp_path / folder, save_steps=1, save_strategy="steps")
        run.optimizer = optimizer
        run.train()
    both.each(lambda m: m.eval())
    both.check()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "compact" / "checkpoint-2")
    same(saved.state_dict(), sparse_comm.dense_state_dict(both.compact))

    resumed = of(llama, weights)
    run = trainer(resumed.compact, tmp_path / "resumed")
    run.optimizer = torch.optim.AdamW(resumed.compact.parameters(), lr=0.01, weight_decay=0.1)
    run.train(resume_from_checkpoint=str(tmp_path / "compact" / "checkpoint-1"))
    same(sparse_comm.dense_state_dict(resumed.compact), sparse_comm.dense_state_dict(both.compact))


def mask_gradients(both: Pair) -> None:
    for name, mask in both.masks.items():
        both.dense.get_parameter(name).grad.masked_fill_(~mask, 0)
