"""A step of a LoRA run against the same step written with the parts of diffusers and PEFT."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests import factories
from tests.conftest import REPOSITORY
from tests.unit.data_sets import records_of
from titans_video.config.options import ActivationOptions, CodecOptions, DataOptions, TrainOptions
from titans_video.config.recipes import BaseOptions, LoraOptions, LoraRunOptions
from titans_video.data.batches import cond_pixels, scaled
from titans_video.data.buckets import Bucket
from titans_video.errors import ConfigError
from titans_video.media.colour import cover_crop, to_tensor
from titans_video.models import lora, lora_io
from titans_video.models.quantized import QuantizedLinear
from titans_video.pretrained.base import open_model_spec
from titans_video.recipes import pretrained as pretrained_recipe
from titans_video.recipes.frozen_base import open_base, precision_of
from titans_video.recipes.lora import LoraFiles, build_lora
from titans_video.recipes.pretrained import PretrainedRecipe, check_sizes, given_frames
from titans_video.recipes.setup import RunParts, open_clips
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.training import distributed
from titans_video.types import Batch

peft = pytest.importorskip("peft")

MOCK = REPOSITORY / "train" / "videos" / "mock_data"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: factories.make_cogvideox(root / kind, kind) for kind in factories.COGVIDEOX_KINDS}


def recipe_and_parts(
    folder: Path,
    frames: int,
    size: tuple[int, int],
    activations: ActivationOptions | None = None,
    dropout: float = 0.0,
    **base: Any,
) -> tuple[PretrainedRecipe, RunParts]:
    """Build a recipe on the clips of the mock data, with an adapter that is not at its start."""
    (task,) = open_model_spec(folder).tasks
    options = LoraRunOptions(
        data=DataOptions(
            manifest=(str(MOCK / "manifest.jsonl"),),
            height=size[0],
            width=size[1],
            num_frames=frames,
            batch_size=2,
            task_mix=f"{task}=1",
        ),
        base=BaseOptions(pretrained_model=str(folder), text_dtype="fp32", **base),
        activations=activations or ActivationOptions(),
        lora=LoraOptions(rank=3, lora_alpha=6.0, lora_dropout=dropout, target_modules="to_q,to_k,to_v,to_out.0,ff"),
        train=TrainOptions(cfg_drop_prob=0.5),
    )
    accelerator = distributed.start(options.train)
    spec, codec_options = open_base(options.base, accelerator), CodecOptions(pretrained_model=str(folder))
    codec, text = spec.codec("fp32", "cpu", load=True), spec.text("fp32", "cpu")
    data, _ = open_clips(options, codec_options, codec, spec.clip_grid, accelerator)
    check_sizes(spec, data)
    parts = RunParts(data, None, codec, codec_options, text, None)
    recipe = build_lora(options, parts, spec, accelerator)
    torch.manual_seed(2)
    for _, layer in lora.layers(recipe.network):
        nn.init.normal_(layer.lora_B[lora.DEFAULT].weight, std=0.2)  # type: ignore[arg-type,union-attr]
    return recipe, parts


def recipe_of(
    folder: Path, frames: int, size: tuple[int, int], *args: Any, **base: Any
) -> tuple[PretrainedRecipe, Batch]:
    """Return the recipe and two rows."""
    recipe, parts = recipe_and_parts(folder, frames, size, *args, **base)
    return recipe, next(iter(parts.data.stream()))


def files_of(recipe: PretrainedRecipe) -> LoraFiles:
    assert isinstance(recipe.adapter, LoraFiles)
    return recipe.adapter


def with_peft(recipe: PretrainedRecipe, folder: Path) -> Any:
    """The stock pipeline, PEFT's own adapter on its transformer."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.transformer.requires_grad_(False)
    names = sorted(name for name, _ in lora.layers(recipe.network))
    pipe.transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names))
    result = peft.set_peft_model_state_dict(pipe.transformer, lora.state_dict(recipe.network))
    assert not result.unexpected_keys
    return pipe


def drawn(vae: Any, pixels: Tensor, seeds: list[int]) -> Tensor:
    """Latents of clips (B, 3, T, H, W), their noise keyed by the rows."""
    each = []
    for x, seed in zip(pixels.split(1), seeds, strict=True):
        found = vae.encode(x).latent_dist
        each.append(found.mean + found.std * seeded_randn(found.mean.shape[1:], [seed]))
    return torch.cat(each)


def loss_by_hand(pipe: Any, batch: Batch) -> Tensor:
    """Return the summed loss of diffusers' training example: x0 from v, the error weighted by 1 / (1 - a)."""
    config, vae = pipe.transformer.config, pipe.vae
    factor = vae.config.scaling_factor
    assert batch.pixels is not None
    with torch.no_grad():
        x0 = (
            drawn(vae, scaled(batch.pixels), [derive_seed(s, "posterior") for s in batch.seeds]).transpose(1, 2)
            * factor
        )
        captions = [
            "" if derive_seed(s, "drop") / 2**63 < 0.5 else c for s, c in zip(batch.seeds, batch.captions, strict=True)
        ]
        assert set(captions) != set(batch.captions)
        states, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=12)
    if config.patch_size_t is not None:
        copies = x0.shape[1] % config.patch_size_t
        x0 = torch.cat([x0[:, :copies], x0], dim=1)
    noise = seeded_randn(x0.transpose(1, 2).shape[1:], [derive_seed(s, "noise") for s in batch.seeds]).transpose(1, 2)
    steps = torch.tensor([derive_seed(s, "time") / 2**63 * 1000 for s in batch.seeds]).long()
    noisy = pipe.scheduler.add_noise(x0, noise, steps)
    given = noisy
    if config.in_channels == 8:
        frames = cond_pixels(batch)
        assert frames is not None
        with torch.no_grad():
            first = drawn(vae, frames[:, :, :1], [derive_seed(s, "first frame") for s in batch.seeds])
        first = (first / factor if vae.config.invert_scale_latents else first * factor).transpose(1, 2)
        given = torch.cat([noisy, torch.cat([first, torch.zeros_like(x0[:, 1:])], dim=1)], dim=2)
    height, width, device = batch.height, batch.width, torch.device("cpu")
    rotary = (
        pipe._prepare_rotary_positional_embeddings(height, width, x0.shape[1], device)
        if config.use_rotary_positional_embeddings
        else None
    )
    ofs = torch.full((1,), 2.0) if config.ofs_embed_dim else None
    out = pipe.transformer(given, states, steps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    guess = pipe.scheduler.get_velocity(out, noisy, steps)
    weight = 1 / (1 - pipe.scheduler.alphas_cumprod[steps]).float()
    return (weight[:, None, None, None, None] * (guess - x0) ** 2).sum()


@pytest.mark.parametrize(
    ("kind", "frames", "size"),
    [
        ("2b", 16, (32, 48)),
        ("5b", 9, (48, 32)),
        ("5b-i2v", 9, (32, 32)),
        ("1.5", 9, (16, 32)),
        ("1.5", 16, (32, 32)),
        ("1.5-i2v", 9, (32, 32)),
    ],
)
def test_loss_and_gradients_of_a_step(
    kind: str, frames: int, size: tuple[int, int], pipelines: dict[str, Path]
) -> None:
    recipe, batch = recipe_of(pipelines[kind], frames, size)
    seeds = [
        next(s for s in range(99) if (derive_seed(s, "drop") / 2**63 < 0.5) is dropped) for dropped in (True, False)
    ]
    batch = replace(batch, seeds=seeds)
    assert (cond_pixels(batch) is not None) == kind.endswith("i2v")
    pipe = with_peft(recipe, pipelines[kind])
    expected = loss_by_hand(pipe, batch)
    ours = recipe.loss(recipe.network, batch).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
    elements = int(recipe.row_elements(batch).sum())
    t = recipe.spec.padded_frames(3 if frames == 9 else 4)
    assert elements == 2 * 4 * t * (size[0] // 8) * (size[1] // 8)
    (ours / elements).backward()
    (expected / elements).backward()
    wanted = {
        n.replace("base_layer", "base"): p.grad for n, p in pipe.transformer.named_parameters() if p.requires_grad
    }
    found = {n: p.grad for n, p in recipe.network.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert all(p.grad is None for p in recipe.network.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", ["2b", "1.5-i2v"])
def test_checkpointing_and_an_offloaded_base_change_no_gradient(kind: str, pipelines: dict[str, Path]) -> None:
    grads = []
    full: dict[str, Any] = {"activations": ActivationOptions(gradient_checkpointing=True)}
    selective = {"activations": ActivationOptions(activation_checkpointing="selective")}
    blocks = ({**full, "offload": "blocks"}, {**selective, "offload": "blocks", "offload_keep": 1})
    for flags in ({}, full, {**full, "offload": "group"}, {**selective, "offload": "group"}, *blocks):
        recipe, batch = recipe_of(pipelines[kind], 9, (32, 32), **flags)
        recipe.network.train()
        recipe.loss(recipe.network, batch).sum().backward()
        grads.append({n: p.grad for n, p in recipe.network.named_parameters() if p.grad is not None})
        assert all(".lora_" in name for name in grads[-1])
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        assert all(torch.equal(value, grads[0][name]) for name, value in other.items())


@pytest.mark.parametrize(("kind", "mode"), [("2b", "full"), ("5b", "full"), ("5b", "selective")])
def test_offloaded_weights_are_never_used(
    kind: str, mode: str, pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a layer has its weights only while it is used; here they are zeros otherwise."""
    from diffusers.hooks.group_offloading import ModuleGroup

    away: dict[int, Tensor] = {}

    def held(group: Any) -> list[Tensor]:
        return [p for m in group.modules for p in m.parameters()] + list(group.parameters)

    def offload(group: Any) -> None:
        for p in held(group):
            if id(p) not in away:
                away[id(p)], p.data = p.data, torch.zeros_like(p.data)

    def onload(group: Any) -> None:
        for p in held(group):
            p.data = away.pop(id(p), p.data)

    plain, batch = recipe_of(pipelines[kind], 9, (32, 32))
    plain.network.train()
    plain.loss(plain.network, batch).sum().backward()
    wanted = {n: p.grad for n, p in plain.network.named_parameters() if p.grad is not None}
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    activations = ActivationOptions(activation_checkpointing=mode)
    recipe, _ = recipe_of(pipelines[kind], 9, (32, 32), activations=activations, offload="group")
    recipe.network.train()
    loss = recipe.loss(recipe.network, batch).sum()
    assert len(away) > 20
    assert all(not bool(p.any()) for p in recipe.network.parameters() if id(p) in away)
    loss.backward()
    found = {n: p.grad for n, p in recipe.network.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert len(away) > 20


def test_a_quantized_base_trains_as_its_dequantized_weights_do(pipelines: dict[str, Path]) -> None:
    """By the flags of a run, streamed from main memory too; and the base in the files is what was rounded."""
    flags: dict[str, Any] = {
        "quantize": "int8",
        "offload": "blocks",
        "activations": ActivationOptions(gradient_checkpointing=True),
    }
    recipe, batch = recipe_of(pipelines["5b"], 9, (32, 32), **flags)
    small = {n: m for n, m in recipe.network.named_modules() if isinstance(m, QuantizedLinear)}
    codes = {n: m.weight.clone() for n, m in small.items()}
    assert any(name.endswith("attn1.to_q.base") for name in small)
    whole, _ = recipe_of(pipelines["5b"], 9, (32, 32))
    losses, gradients = [], []
    for name, layer in small.items():
        weight: Any = whole.network.get_submodule(name).weight
        assert (layer.dequantize() - weight).norm() < 0.01 * weight.norm()
        weight.data = layer.dequantize()
    for made in (recipe, whole):
        made.network.train()
        losses.append(made.loss(made.network, batch).sum())
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in made.network.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert all(torch.equal(layer.weight, codes[name]) for name, layer in small.items())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_base_in_8_bits_trains_as_its_rounded_weights_do(mode: str, pipelines: dict[str, Path]) -> None:
    activations = ActivationOptions(activation_checkpointing=mode)
    recipe, batch = recipe_of(pipelines["5b"], 9, (32, 32), activations, layerwise_casting="fp8_e4m3")
    stored = [n for n, p in recipe.network.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert any("ff.net" in name for name in stored)
    assert any(name.endswith("to_q.base.weight") for name in stored)
    assert all(p.dtype == torch.float32 for p in recipe.network.parameters() if p.requires_grad)
    rounded, _ = recipe_of(pipelines["5b"], 9, (32, 32))
    with torch.no_grad():
        for name, p in rounded.network.named_parameters():
            if name in stored:
                p.copy_(p.to(torch.float8_e4m3fn).float())
    a, b = recipe.loss(recipe.network, batch).sum(), rounded.loss(rounded.network, batch).sum()
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    wanted = {n: p.grad for n, p in rounded.network.named_parameters() if p.grad is not None}
    for name, p in recipe.network.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, wanted[name]), name


def test_a_base_in_bf16_is_near_and_the_adapter_stays_in_float32(pipelines: dict[str, Path]) -> None:
    whole, batch = recipe_of(pipelines["2b"], 9, (32, 32))
    half, _ = recipe_of(pipelines["2b"], 9, (32, 32), base_dtype="bf16")
    assert {p.dtype for p in half.network.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.network.parameters() if not p.requires_grad} == {torch.bfloat16}
    a, b = whole.loss(whole.network, batch).sum(), half.loss(half.network, batch).sum()
    assert b.dtype == torch.float32
    assert b.item() == pytest.approx(a.item(), rel=0.05)


@pytest.mark.parametrize("kind", factories.COGVIDEOX_KINDS)
def test_the_stock_pipeline_makes_our_video_with_the_saved_file(
    kind: str, pipelines: dict[str, Path], tmp_path: Path
) -> None:
    """To 1e-5, and so do merged weights and PEFT's own file as read here."""
    recipe, _ = recipe_of(pipelines[kind], 9, (32, 32))
    trained = {n: p for n, p in recipe.network.named_parameters() if p.requires_grad}
    files_of(recipe).export(trained, tmp_path)
    t = recipe.spec.padded_frames(3)
    image = {"image": torch.rand(1, 3, 32, 32)} if recipe.spec.needs_image else {}
    noise = torch.randn(1, t, 4, 4, 4)

    def video(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(
            prompt="a red circle", **image, height=32, width=32, num_frames=9, num_inference_steps=3,
            guidance_scale=3.0, latents=noise, generator=torch.Generator().manual_seed(5), max_sequence_length=12,
            output_type="pt",
        ).frames  # fmt: skip
        return frames.detach()

    stock = diffusers.DiffusionPipeline.from_pretrained(pipelines[kind])
    without = video(stock)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs = video(stock)
    assert (theirs - without).abs().max() > 0.01  # it does something
    spec = recipe.spec
    network = recipe.network.eval()
    ours = video(spec.pipeline(network, recipe.codec, text=True, dtype=torch.float32))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    lora.merge(network)
    merged = video(spec.pipeline(network, recipe.codec, text=True, dtype=torch.float32))
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)
    lora.unmerge(network)
    # PEFT's own file of the same adapter.
    pipe = with_peft(recipe, pipelines[kind])
    pipe.transformer.save_lora_adapter(tmp_path / "peft")
    read = lora_io.read(tmp_path / "peft")
    fresh = spec.load_network(torch.float32)
    lora.load(fresh, read.tensors, read.alphas)
    assert read.notes == []
    assert read.alphas == {name: 6.0 for name, _ in lora.layers(network)}
    back = video(spec.pipeline(fresh, recipe.codec, text=True, dtype=torch.float32))
    assert torch.equal(back, ours)


def test_dropout_of_training_is_not_in_the_file(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """diffusers leaves a loaded adapter's dropout switched on."""
    recipe, _ = recipe_of(pipelines["2b"], 9, (32, 32), dropout=0.5)
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in recipe.network.modules())
    files_of(recipe).export({n: p for n, p in recipe.network.named_parameters() if p.requires_grad}, tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(pipelines["2b"])
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    x, states, time = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 12, 16), torch.tensor([300])
    first, second = (stock.transformer(x, states, time, return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_base_is_not_touched(pipelines: dict[str, Path]) -> None:
    recipe, batch = recipe_of(pipelines["2b"], 9, (32, 32))
    before = copy.deepcopy(recipe.spec.load_network(torch.float32).state_dict())
    optimizer = torch.optim.AdamW([p for p in recipe.network.parameters() if p.requires_grad], lr=0.1)
    recipe.loss(recipe.network, batch).sum().backward()
    optimizer.step()
    lora.remove(recipe.network)
    assert all(torch.equal(value, before[name]) for name, value in recipe.network.state_dict().items())


def test_flops_do_not_depend_on_the_captions(pipelines: dict[str, Path]) -> None:
    """The text of a pretrained model has one length. `test_models_flops.py` compares the numbers with torch's."""
    recipe, batch = recipe_of(pipelines["1.5-i2v"], 9, (32, 32))
    assert recipe.flops(batch) == 2 * recipe.flops(replace(batch, ids=batch.ids[:1])) > 0
    assert recipe.flops(replace(batch, captions=["a much longer caption"] * 2)) == recipe.flops(batch)
    assert recipe.tokens(batch) == 2 * 2 * 2 * 2


def test_a_validation_video_begins_with_the_frame_of_its_caption(pipelines: dict[str, Path]) -> None:
    """In the size of the videos, whatever bucket the row is in; rows that cannot be read are skipped."""
    recipe, parts = recipe_and_parts(pipelines["1.5-i2v"], 9, (32, 32))
    data, spec = parts.data, recipe.spec
    assert given_frames(data, open_model_spec(pipelines["1.5"]), "x") is None
    both = open_model_spec(pipelines["1.5-i2v"])
    both.end_frame = "required"
    entry = next(e for e in data.records if e.row.cond_image is None)
    reader = data.reader()
    first = reader.clip(reader.decide(entry, "i2v", 0))[0]
    expected = torch.from_numpy(first).permute(2, 0, 1).float() / 127.5 - 1
    others = [e for e in data.records if e.row.caption != entry.row.caption]
    found = given_frames(replace(data, records=records_of([*others, entry])), spec, entry.row.caption)
    assert found is not None
    torch.testing.assert_close(found[0, :, 0], expected, rtol=0, atol=1e-6)
    ends = given_frames(replace(data, records=records_of([*others, entry])), both, entry.row.caption)
    assert ends is not None
    assert torch.equal(ends[:, :, :1], found)
    assert torch.equal(ends[0, :, 1:], to_tensor(reader.clip(reader.decide(entry, "i2v", 0))[-1:]))
    large = replace(data, records=records_of([replace(others[0], bucket=Bucket(9, 16, 80)), *others[1:], entry]))
    found = given_frames(large, spec, entry.row.caption, (16, 80))
    assert found is not None
    assert torch.equal(found[0], to_tensor(cover_crop(first[None], 16, 80)))
    found = given_frames(large, spec, "nothing of the kind", (16, 80))
    assert found is not None
    assert found.shape == (1, 3, 1, 16, 80)
    missing = replace(entry, row=replace(entry.row, video=MOCK / "missing.mp4"))
    found = given_frames(replace(large, records=records_of([missing, *large.records[:-1]])), spec, entry.row.caption)
    assert found is not None


def test_processes_with_other_base_weights_are_refused(
    pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process reads the frozen weights itself."""
    monkeypatch.setattr(pretrained_recipe, "all_gather_object", lambda accelerator, own: [own, "another"])
    with pytest.raises(ConfigError, match="different networks"):
        recipe_of(pipelines["2b"], 9, (32, 32))


@pytest.mark.parametrize(
    ("base", "accelerator", "said"),
    [
        ({"offload": "group"}, {"num_processes": 2}, "for one process"),
        ({"offload": "group"}, {"is_fsdp2": True}, "so does FSDP2"),
        ({"layerwise_casting": "fp8_e5m2"}, {"is_fsdp2": True}, "so does FSDP2"),
        ({}, {"mixed_precision": "fp16"}, "CPUs compute in fp32"),
    ],
)
def test_what_an_accelerator_cannot_do_is_rejected_before_loading(
    base: dict[str, Any], accelerator: dict[str, Any], said: str
) -> None:
    usual = {"mixed_precision": "no", "device": torch.device("cpu"), "is_fsdp2": False, "num_processes": 1}
    with pytest.raises(ConfigError, match=said):
        precision_of(BaseOptions(**base), SimpleNamespace(**(usual | accelerator)))  # type: ignore[arg-type]
