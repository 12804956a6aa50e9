"""Test the frozen diffusion model on a tiny random pipeline: taps, one noised step, generation, loading."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from diclip.diffusion import Diffusion, load_diffusion
from diclip.surgery import attend
from diclip.taps import attentions, diclip_layers, tap

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
COARSE = "up_blocks.0.attentions.2.transformer_blocks.0.attn1"
FINE = "up_blocks.2.attentions.1.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def diffusion(saved) -> Diffusion:
    return load_diffusion(saved)


def images(batch: int = 2, height: int = 128, width: int = 128) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def capture(diffusion, x, **changed):
    arguments = {"timestep": 101, "coarse": COARSE, "fine": FINE, "fine_heads": (0, 1), "generator": seeded()}
    return diffusion.capture(x, **arguments | changed)


# Taps


def hooks(model: torch.nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def test_attentions_in_order_with_heads_and_strides(diffusion):
    found = attentions(diffusion.unet)
    parts = [name.split(".")[0] for name in found]
    assert parts == ["down_blocks"] * 12 + ["mid_block"] * 2 + ["up_blocks"] * 18
    assert list(diffusion.self_attentions()) == [name for name in found if name.endswith("attn1")]
    assert [layer.heads for layer in found.values()] == [2] * 4 + [4] * 8 + [4] * 2 + [4] * 12 + [2] * 6
    assert [layer.stride for layer in found.values()] == [1] * 4 + [2] * 4 + [4] * 6 + [4] * 6 + [2] * 6 + [1] * 6
    assert diclip_layers(diffusion.unet) == (COARSE, FINE)


def test_grids_are_those_of_the_unet(diffusion):
    latents = torch.zeros(1, 4, 6, 11)
    names = list(diffusion.self_attentions())
    with tap(diffusion.unet, names) as seen:
        diffusion.predict(latents, timestep=0, generator=seeded())
    for name, layer in diffusion.self_attentions().items():
        h, w = layer.grid(latents)
        assert seen[name][0].shape[:3] == (1, layer.heads, h * w)
    assert {layer.grid(latents) for layer in diffusion.layers.values()} == {(6, 11), (3, 6), (2, 3)}


@pytest.mark.parametrize("name", [COARSE, FINE, COARSE.replace("attn1", "attn2")])
def test_queries_keys_and_probabilities_are_the_layers_own(diffusion, name):
    layer, seen = diffusion.unet.get_submodule(name), {}

    def look(module, arguments, named, output):
        seen.update(x=arguments[0], context=named["encoder_hidden_states"], output=output)

    handle = layer.register_forward_hook(look, with_kwargs=True)
    with handle, tap(diffusion.unet, [name]) as taps:
        diffusion.predict(diffusion.encode(images()), timestep=101, generator=seeded(), prompt="a dog")
    q, k = taps[name]
    x, context = seen["x"], seen["x"] if seen["context"] is None else seen["context"]
    assert name.endswith("attn2") == (seen["context"] is not None)
    d, mixed = x.shape[-1] // layer.heads, []
    for head in range(layer.heads):
        rows = slice(head * d, (head + 1) * d)
        torch.testing.assert_close(q[:, head], x @ layer.to_q.weight[rows].T)
        torch.testing.assert_close(k[:, head], context @ layer.to_k.weight[rows].T)
        probabilities = (q[:, head] @ k[:, head].mT / d**0.5).softmax(-1)
        mixed.append(probabilities @ (context @ layer.to_v.weight[rows].T))
    torch.testing.assert_close(layer.to_out[0](torch.cat(mixed, dim=-1)), seen["output"])


def test_model_is_as_it_was(diffusion):
    processors, before = dict(diffusion.unet.attn_processors), hooks(diffusion.unet)
    weights = {name: weight.clone() for name, weight in diffusion.unet.state_dict().items()}
    plain = diffusion.predict(diffusion.encode(images()), timestep=101, generator=seeded())
    with tap(diffusion.unet, [COARSE]) as taps:
        assert hooks(diffusion.unet) == before + 2
        watched = diffusion.predict(diffusion.encode(images()), timestep=101, generator=seeded())
    assert watched.equal(plain) and COARSE in taps
    with pytest.raises(RuntimeError, match="in between"), tap(diffusion.unet, [COARSE, FINE]):
        raise RuntimeError("in between")
    with pytest.raises(ValueError, match="attn1"), tap(diffusion.unet, [COARSE, FINE + "x"]):
        pass
    capture(diffusion, images())

    def fail(*_):
        raise RuntimeError("inside the U-Net")

    with diffusion.unet.conv_in.register_forward_hook(fail), pytest.raises(RuntimeError, match="inside the U-Net"):
        capture(diffusion, images())
    assert hooks(diffusion.unet) == before
    assert all(diffusion.unet.attn_processors[name] is each for name, each in processors.items())
    assert all(weight.equal(weights[name]) for name, weight in diffusion.unet.state_dict().items())
    assert all(not each.training for each in (diffusion.unet, diffusion.vae, diffusion.text_encoder))
    assert not any(p.requires_grad for each in (diffusion.unet, diffusion.vae) for p in each.parameters())


def test_taps_nest_and_repeat(diffusion):
    with tap(diffusion.unet, [COARSE, COARSE]) as outer, tap(diffusion.unet, [COARSE]) as inner:
        diffusion.predict(torch.zeros(1, 4, 8, 8), timestep=0, generator=seeded())
    assert outer[COARSE][0].equal(inner[COARSE][0]) and outer[COARSE][1].equal(inner[COARSE][1])


def test_another_thread_is_neither_recorded_nor_stopped(diffusion):
    """A notebook's cells and its widgets use one U-Net at once."""
    latents = torch.zeros(1, 4, 8, 8)
    with ThreadPoolExecutor(1) as other, tap(diffusion.unet, [COARSE], stop=True) as taps:
        whole = other.submit(diffusion.predict, latents + 1, timestep=0, generator=seeded()).result()
        assert not taps and whole.shape == latents.shape
        diffusion.predict(latents, timestep=0, generator=seeded())
        pytest.fail("the U-Net went on")
    with tap(diffusion.unet, [COARSE]) as alone:
        diffusion.predict(latents, timestep=0, generator=seeded())
    assert all(one.equal(other) for one, other in zip(taps[COARSE], alone[COARSE], strict=True))


def test_nothing_runs_after_the_last_tap(diffusion):
    calls, latents, names = [], diffusion.encode(images()), [FINE, COARSE, FINE]
    with tap(diffusion.unet, names) as whole:
        diffusion.predict(latents, timestep=101, generator=seeded())
    layer = diffusion.unet.get_submodule(FINE)
    with ExitStack() as hooks:
        for name, part in (("value", layer.to_v), ("end", diffusion.unet.conv_out), ("start", diffusion.unet.conv_in)):
            hooks.enter_context(part.register_forward_hook(lambda *_, name=name: calls.append(name)))
        with tap(diffusion.unet, names, stop=True) as taps:
            diffusion.predict(latents, timestep=101, generator=seeded())
            pytest.fail("the U-Net went on")
        capture(diffusion, images())
    assert calls == ["start", "start"]
    assert all(one.equal(other) for name in names for one, other in zip(taps[name], whole[name], strict=True))


# One noised step


def test_latents_are_the_pipelines(diffusion):
    x = images()
    pixels = diffusion.pipeline.image_processor.preprocess(x)
    with torch.no_grad():
        expected = diffusion.vae.encode(pixels).latent_dist.mode() * diffusion.vae.config.scaling_factor
    torch.testing.assert_close(diffusion.encode(x), expected)
    assert diffusion.factor == 4 and expected.shape == (2, 4, 32, 32)


@pytest.mark.parametrize("prompt", ["", "a cat", ["a dog", "grass"]])
def test_step_is_diffusers_own(diffusion, prompt):
    latents = diffusion.encode(images())
    found = diffusion.predict(latents, timestep=400, generator=seeded(), prompt=prompt)
    generator = seeded()
    noise = torch.cat([torch.randn(1, 4, 32, 32, generator=generator) for _ in latents])
    noised = DDPMScheduler(**BETAS).add_noise(latents, noise, torch.tensor([400, 400]))
    prompts = [prompt] * 2 if isinstance(prompt, str) else prompt
    with torch.no_grad():
        texts = diffusion.pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        expected = diffusion.unet(noised, 400, encoder_hidden_states=texts).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_capture(diffusion):
    x = images()
    taps = capture(diffusion, x)
    assert taps.coarse_q.shape == taps.coarse_k.shape == (2, 4, 64, 2) and taps.coarse_grid == (8, 8)
    assert taps.fine.shape == (2, 1024, 1024) and taps.fine_grid == (32, 32)
    with tap(diffusion.unet, [COARSE, FINE]) as raw:
        diffusion.predict(diffusion.encode(x), timestep=101, generator=seeded())
    assert taps.coarse_q.equal(raw[COARSE][0]) and taps.coarse_k.equal(raw[COARSE][1])
    torch.testing.assert_close(taps.fine, attend(*raw[FINE]).mean(1))
    second = capture(diffusion, x, fine_heads=(1,))
    torch.testing.assert_close(second.fine, attend(*raw[FINE])[:, 1])
    without = capture(diffusion, x, fine=None)
    assert without.fine is None and without.fine_grid is None and without.coarse_q.equal(taps.coarse_q)
    assert capture(diffusion, x, latents=diffusion.encode(x)).coarse_q.equal(taps.coarse_q)


def test_noise_is_the_generators(diffusion):
    x = images()
    first, again, other = (capture(diffusion, x, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first.coarse_q.equal(again.coarse_q) and first.fine.equal(again.fine)
    assert (first.coarse_q - other.coarse_q).abs().max() > 1e-3
    generator = seeded()
    draws = [capture(diffusion, x, generator=generator).coarse_q for _ in range(2)]
    assert draws[0].equal(first.coarse_q) and not draws[1].allclose(draws[0], atol=1e-3)


def test_timestep_and_prompt_matter(diffusion):
    x = images()
    first = capture(diffusion, x).coarse_q
    assert (capture(diffusion, x, timestep=601).coarse_q - first).abs().max() > 1e-3
    assert (capture(diffusion, x, prompt="a dog").coarse_q - first).abs().max() > 1e-5


def test_batch_equals_loop(diffusion):
    x, prompts = images(3), ["a dog", "", "a cat"]
    together = capture(diffusion, x, prompt=prompts)
    each = capture(diffusion, x, prompt=prompts, generator=[seeded(), seeded(), seeded()])
    generator = seeded()
    for i in range(3):
        own = {"prompt": prompts[i]}
        in_turn = capture(diffusion, x[i : i + 1], generator=generator, **own)
        torch.testing.assert_close(together.coarse_q[i : i + 1], in_turn.coarse_q, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.fine[i : i + 1], in_turn.fine, atol=1e-5, rtol=1e-3)
        alone = capture(diffusion, x[i : i + 1], **own)
        torch.testing.assert_close(each.coarse_q[i : i + 1], alone.coarse_q, atol=1e-4, rtol=1e-4)


def test_non_square_picture(diffusion):
    taps = capture(diffusion, images(1, 64, 112))
    assert taps.coarse_grid == (4, 7) and taps.coarse_q.shape == (1, 4, 28, 2)
    assert taps.fine_grid == (16, 28) and taps.fine.shape == (1, 448, 448)
    torch.testing.assert_close(taps.fine.sum(-1), torch.ones(1, 448))


def test_timesteps(diffusion):
    assert diffusion.timestep_at(45) == diffusion.timestep_at(45, scheduler="pndm") == 101
    assert diffusion.timestep_at(45, scheduler="ddim") == 81
    assert [diffusion.timestep_at(i, scheduler="ddim") for i in (0, 49, -1)] == [981, 1, 1]
    assert diffusion.timestep_at(50) == 1 and diffusion.timestep_at(9, steps=10) == 101
    assert diffusion.scheduler.timesteps is None  # the model's own scheduler is left alone


def test_timesteps_of_a_ddim_model(diffusion):
    other = StableDiffusionPipeline(
        **diffusion.pipeline.components | {"scheduler": DDIMScheduler(steps_offset=1, clip_sample=False, **BETAS)},
        requires_safety_checker=False,
    )
    assert Diffusion(other).timestep_at(45) == 81 and Diffusion(other).timestep_at(45, scheduler="pndm") == 101


def test_timesteps_of_a_scheduler_that_the_pipeline_mends(diffusion):
    old = diffusion.pipeline.components | {"scheduler": PNDMScheduler(skip_prk_steps=True, **BETAS)}
    with pytest.warns(FutureWarning, match="steps_offset"):
        other = StableDiffusionPipeline(**old, requires_safety_checker=False)
    assert Diffusion(other).timestep_at(45) == 101


def test_half_precision(saved):
    diffusion = load_diffusion(saved, dtype=torch.bfloat16)
    assert diffusion.unet.dtype == diffusion.vae.dtype == diffusion.text_encoder.dtype == torch.bfloat16
    taps = capture(diffusion, images(1))
    assert {taps.coarse_q.dtype, taps.coarse_k.dtype, taps.fine.dtype} == {torch.float32}
    torch.testing.assert_close(taps.fine.sum(-1), torch.ones(1, 1024))
    full = capture(load_diffusion(saved), images(1))
    torch.testing.assert_close(taps.coarse_q, full.coarse_q, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"images": torch.zeros(3, 32, 32)}, "expected float"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "divide by 255"),
        ({"images": torch.zeros(1, 3, 32, 30)}, "multiples of 4x4"),
        ({"timestep": 1000}, "0 to 999"),
        ({"timestep": -1}, "0 to 999"),
        ({"coarse": COARSE.replace("2", "3", 1)}, "such as up_blocks.0.attentions.2"),
        ({"coarse": COARSE.replace("attn1", "attn2")}, "no self-attention"),
        ({"fine_heads": (2,)}, "0 to 1"),
        ({"fine_heads": ()}, "0 to 1"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "expected \\(B, 4, h, w\\)"),
        ({"prompt": ["one", "two"]}, "2 prompts for 1 images"),
        ({"generator": [seeded()] * 3}, "3 generators"),
    ],
)
def test_bad_arguments_say_so_in_one_line(diffusion, bad, message):
    good = {"timestep": 1, "coarse": COARSE, "fine": FINE, "fine_heads": (0,), "generator": seeded()}
    arguments = {"images": torch.zeros(1, 3, 32, 32)} | good | bad
    with pytest.raises(ValueError, match=message) as error:
        diffusion.capture(**arguments)
    assert "\n" not in str(error.value)


def test_other_bad_arguments(diffusion):
    with pytest.raises(ValueError, match="0 to 50 with 50 steps"):
        diffusion.timestep_at(51)
    with pytest.raises(ValueError, match="ddim, pndm or None"):
        diffusion.timestep_at(1, scheduler="euler")
    with pytest.raises(ValueError, match="multiples of 8"):
        diffusion.generate(["a dog"], size=36, generator=seeded())
    with pytest.raises(ValueError, match="0 prompts"):
        diffusion.generate([], size=32, generator=seeded())


def test_a_small_unet_has_no_published_layers():
    unet = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 8}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    model = UNet2DConditionModel(**unet, **kinds, attention_head_dim=2)
    with pytest.raises(ValueError, match="name the two layers"):
        diclip_layers(model)


# Generation


@pytest.mark.parametrize("scheduler", [None, "ddim", "pndm"])
def test_generation_depends_on_the_generator_alone(diffusion, scheduler, capfd, caplog):
    prompts = ["a dog", "a cat", "a sheep"]
    arguments = {"size": (32, 64), "steps": 2, "scheduler": scheduler}
    made = diffusion.generate(prompts, generator=seeded(), batch_size=3, **arguments)
    assert made.shape == (3, 3, 32, 64) and made.dtype == torch.float32
    assert made.min() >= 0 and made.max() <= 1 and made.std() > 0.01
    generator = seeded()
    torch.testing.assert_close(diffusion.generate(prompts, generator=generator, batch_size=2, **arguments), made)
    after = diffusion.generate(prompts, generator=generator, batch_size=2, **arguments)
    assert (after - made).abs().max() > 1e-3
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_random_schedulers_pictures_do_not_depend_on_the_batch(diffusion):
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False, **BETAS)
    parts = diffusion.pipeline.components | {"scheduler": scheduler}
    other = Diffusion(StableDiffusionPipeline(**parts, requires_safety_checker=False))
    made = [other.generate(["a", "b"], size=32, steps=2, generator=seeded(), batch_size=n) for n in (1, 2)]
    torch.testing.assert_close(*made)


def test_generation_is_the_pipelines(diffusion):
    made = diffusion.generate(["a dog"], size=32, steps=3, guidance=3, scheduler="ddim", generator=seeded())
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False, **BETAS)
    parts = diffusion.pipeline.components | {"scheduler": scheduler}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own = seeded(int(torch.randint(2**62, (1,), generator=seeded())))
    latents = torch.randn(1, 4, 8, 8, generator=own)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    expected = pipeline("a dog", latents=latents, guidance_scale=3, **arguments).images
    torch.testing.assert_close(made, expected)
    plain = diffusion.generate(["a dog"], size=32, steps=3, guidance=1, scheduler="ddim", generator=seeded())
    assert (plain - made).abs().max() > 1e-4
