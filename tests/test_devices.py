"""The network on a GPU, in every form. Without one the same tests run on the CPU, on the smallest case."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_groupmixformer import SIZE, STAGES, relative_error

from groupmixformer import GroupMixFormer, fuse

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FORMS = {
    "eager": lambda model, images: model,
    "fused": lambda model, images: fuse(model),
    "fused, exported": lambda model, images: torch.export.export(fuse(model), (images,)).module(),
    "compiled": lambda model, images: torch.compile(model, dynamic=False),
    "fused, compiled": lambda model, images: torch.compile(fuse(model), dynamic=False),
    "fused, CUDA graphs": lambda model, images: torch.compile(fuse(model), dynamic=False, mode="reduce-overhead"),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        *(("test", form, torch.float64) for form in ("eager", "fused")),
        *(("test", form, torch.float32) for form in ("eager", "fused")),
        pytest.param("test", "fused, exported", torch.float32, marks=pytest.mark.slow),
        # Compiled for the CPU they are tested beside the modules; benchmarks/gpu.py checks the large ones.
        *(pytest.param("test", form, torch.float32, marks=needs_gpu) for form in list(FORMS)[3:]),
        *(
            pytest.param(name, form, torch.float32, marks=needs_gpu)
            for name in ("mobile", "small")
            for form in ("eager", "fused")
        ),
    ],
)
def test_golden_values(golden, device, name, form, dtype):
    values = golden(name)
    case = values.cases[0]
    images = values.images(case).to(device, dtype)
    network = FORMS[form](values.model().to(device, dtype), images)
    with torch.inference_mode():
        for _ in range(3):  # a CUDA graph is recorded in the second run and replayed in the third
            logits = network(images)
    # PyTorch's hardswish multiplies by a sixth in float32, on a GPU in float64 too: 3e-8.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9 if device == "cpu" else 1e-6
    assert relative_error(logits.cpu(), values.arrays["logits_0"]) < tolerance


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_training_step(golden, as_released, device, checkpointing):
    values = golden("test")
    model = values.model().to(device).double().train()
    model.set_grad_checkpointing(checkpointing)
    images, labels = values.images(values.train).to(device).double(), torch.tensor(values.train["labels"], device=device)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    assert abs(loss.item() - values.arrays["train_loss"].item()) < 1e-6
    gradients = as_released({name: parameter.grad for name, parameter in model.named_parameters()})
    norms = torch.stack([gradients[name].norm() for name in values.train["grad_keys"]]).cpu()
    expected = values.arrays["train_grad_norm"]
    assert (norms - expected).abs().max() < 1e-6 * expected.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1, 1000])
def test_low_precision_stays_finite(randomise, device, dtype, strength):
    model = randomise(GroupMixFormer(**STAGES, num_classes=6)).to(device).train()
    images = strength * torch.randn(4, 3, *SIZE, device=device)
    with torch.autocast(device, dtype):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(4, device=device)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    fused = fuse(model.eval()).to(dtype)
    with torch.inference_mode():
        assert fused(images.to(dtype)).isfinite().all()


@pytest.mark.parametrize("mode", [None, pytest.param("default", marks=needs_gpu)])
@pytest.mark.parametrize("train", [False, True])
def test_it_is_measured(device, mode, train):
    from groupmixformer.bench.timing import Runner, Settings, measure

    settings = Settings(
        train=train, batch_size=2, size=(64, 64), dtype="bf16", compile=mode, device=device, rounds=1, seconds=0.0
    )
    (row,) = measure({"tiny": lambda: Runner(GroupMixFormer(**STAGES), settings)}, settings)
    assert row["milliseconds"] > 0
    assert row["peak_memory"] is None or row["peak_memory"] >= 0


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_cuda_graphs_give_what_the_fused_network_gives(randomise, dtype):
    from groupmixformer.tasks.graphs import replay_repeated

    plain = fuse(randomise(GroupMixFormer(**STAGES, num_classes=6)).cuda().eval())
    fast, images = copy.deepcopy(plain), torch.randn(5, 2, 3, *SIZE, device="cuda")
    replay_repeated(fast)
    with torch.inference_mode():
        for batch in (*images, *images):  # recorded at the third
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                assert relative_error(fast(batch).float(), plain(batch).float()) < (1e-5 if dtype is None else 0.02)


@needs_gpu
def test_blocks_compile_on_a_gpu(randomise):
    from groupmixformer.training.module import compile_blocks

    plain = randomise(GroupMixFormer(**STAGES, num_classes=6)).cuda().train()
    fast, images = copy.deepcopy(plain), torch.randn(4, 3, *SIZE, device="cuda")
    compile_blocks(fast)
    for model in (plain, fast):
        model(images).square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert relative_error(two.grad, one.grad) < 1e-2, name
