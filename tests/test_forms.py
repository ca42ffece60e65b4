"""Every form of the network gives the golden values: eager, fused, traced, scripted, exported, compiled."""

import pytest
import torch
import torch.nn.functional as F
from test_groupmixformer import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["float64", "float32"]
)


@precisions
def test_logits(golden, form, dtype, tolerance):
    values = golden("test")
    sizes = [values.images(case).to(dtype) for case in values.cases]
    with torch.no_grad():
        network = form.build(values.model().to(dtype), sizes[0])
        for i, images in enumerate(sizes if form.any_size else sizes[:1]):
            assert relative_error(network(images), values.arrays[f"logits_{i}"]) < tolerance


@precisions
@pytest.mark.parametrize("form", ["eager", "fused, eager"], indirect=True)
@pytest.mark.parametrize("name", ["test", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobile", "small"))])
def test_features(golden, form, name, dtype, tolerance):
    values = golden(name)
    for i, case in enumerate(values.cases):
        images = values.images(case).to(dtype)
        network = form.build(values.model().to(dtype), images)
        with torch.no_grad():
            last, features = network.forward_intermediates(images)
            assert relative_error(network.forward_head(last), values.arrays[f"logits_{i}"]) < tolerance
        assert [list(feature.shape) for feature in features] == case["feature_shapes"]
        for j, feature in enumerate(features):
            assert relative_error(feature.mean((0, 2, 3)), values.arrays[f"feat_{i}_{j}_mean"]) < tolerance
            assert relative_error(feature[0, :, 0, 0], values.arrays[f"feat_{i}_{j}_corner"]) < tolerance


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(golden, as_released, checkpointing):
    values = golden("test")
    model = values.model().double().train()
    model.set_grad_checkpointing(checkpointing)
    labels = torch.tensor(values.train["labels"])
    loss = F.cross_entropy(model(values.images(values.train).double()), labels)
    loss.backward()
    assert abs(loss.item() - values.arrays["train_loss"].item()) < 1e-6
    gradients, buffers = as_released({n: p.grad for n, p in model.named_parameters()}), as_released(dict(model.named_buffers()))
    assert set(gradients) == set(values.train["grad_keys"])
    norms = torch.stack([gradients[name].norm() for name in values.train["grad_keys"]])
    expected = values.arrays["train_grad_norm"]
    assert (norms - expected).abs().max() < 1e-6 * expected.max()  # of biases before a batch norm they are 0
    norms = torch.stack([buffers[name].double().norm() for name in values.train["buffer_keys"]])
    torch.testing.assert_close(norms, values.arrays["train_buffer_norm"], rtol=1e-6, atol=0)
