"""What the tests share: the golden values, weights that anyone can rebuild, and settings that make runs repeatable."""

import functools
import json
import os
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before timm is imported; no test may need the network

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from groupmixformer import GroupMixFormer
from groupmixformer.models.groupmixformer import checkpoint_filter_fn

# One thread: results must not depend on the machine, and OpenMP's barriers make many small operations up to 100 times slower
# when workers of pytest-xdist or other programs share the cores.
torch.set_num_threads(1)

# What takes over three seconds and has a quicker sibling, or repeats what the quickstart shows; others are marked in place.
SLOW = (
    "test_bench.py::test_accuracy_is_drawn_against_speed",
    "test_bench.py::test_detectors_and_segmenters_are_fused[detection]",
    "test_bench.py::test_every_task_runs[segmentation-False]",
    "test_bench.py::test_latency_is_of_one_image",
    "test_bench.py::test_memory_grows_with_the_batch",
    "test_bench.py::test_others_are_not_fused",
    "test_cli.py::test_data_sets_of_torchvision_and_hugging_face_train",
    "test_cli.py::test_light_things_import_nothing_heavy[from",
    "test_cli.py::test_light_things_import_nothing_heavy[import groupmixformer.tasks.classification.metrics",
    "test_cli.py::test_models_lists_what_it_counts",
    "test_cli.py::test_the_installed_command_leaves_stdout_to_the_result",
    "test_cli.py::test_the_same_seed_gives_the_same_run",
    "test_detection.py::test_a_detector_continues_with_all_weights_that_fit[mask_rcnn-groupmixformer_mobile]",
    "test_detection.py::test_a_detector_trains_finds_and_is_loaded_as_it_was_saved[faster_rcnn",
    "test_detection.py::test_a_detector_trains_finds_and_is_loaded_as_it_was_saved[mask_rcnn-swin",
    "test_detection.py::test_a_detector_trains_finds_and_is_loaded_as_it_was_saved[retinanet",
    "test_detection.py::test_a_stopped_run_ends_as_if_it_had_not_been[middle",
    "test_docs.py::test_code_blocks_run[checkpoints.md]",
    "test_docs.py::test_code_blocks_run[speed.md]",
    "test_docs.py::test_code_blocks_run[timm.md]",
    "test_explanations.py::test_several_images_in_one_call",
    "test_explanations.py::test_the_object_nearest_to_a_query_is_taken",
    "test_export.py::test_a_wrong_file_is_removed_and_an_earlier_one_kept[shifted",
    "test_groupmixformer.py::test_golden_values_compiled[export]",
    "test_groupmixformer.py::test_variant[groupmixformer_base]",
    "test_groupmixformer.py::test_variant[groupmixformer_large",
    "test_segmentation.py::test_a_segmenter_starts_from_another",
    "test_segmentation.py::test_decoders_and_backbones[fpn-groupmixformer_mobile]",
    "test_segmentation.py::test_decoders_and_backbones[upernet-swin",
    "test_segmentation.py::test_each_way_to_look_gives_another_result",
    "test_segmentation.py::test_gradient_checkpointing_changes_no_gradient[groupmixformer_mobile]",
    "test_serve.py::test_other_tasks_are_served_one_at_a_time",
    "test_streaming.py::test_folders_and_single_files_work_as_hugging_face_sets",
    "test_training.py::test_finetuning_keeps_the_classifier_of_the_same_classes[plain-['zero', 'one']-True]",
    "test_transformers.py::test_trainer_fine_tunes",
)

# Slow tests that repeat another one on a larger variant or in another form: minutes each, run before a release by
# `pytest -m exhaustive`. The others are those that .ci/run has the time for.
EXHAUSTIVE = (
    "test_bench.py::test_compiled_models_are_measured[mobile-",
    "test_bench.py::test_compiled_weights_are_frozen_and_the_result_is_the_same[max-autotune]",
    "test_detection.py::test_groupmixformer_learns_to_find_shapes",
    "test_detection.py::test_processes_measure_what_one_does",
    "test_docs.py::test_code_blocks_run[detect.md]",
    "test_docs.py::test_code_blocks_run[onnxruntime.md]",
    "test_docs.py::test_code_blocks_run[segment.md]",
    "test_docs.py::test_code_blocks_run[torchvision.md]",
    "test_evaluation.py::test_numbers_equal_timms_on_imagenet",
    "test_evaluation.py::test_numbers_equal_timms_on_many_images[another size and crop]",
    "test_evaluation.py::test_numbers_equal_timms_on_many_images[border]",
    "test_export.py::test_segmenters[fpn-pt2]",
    "test_export.py::test_segmenters[upernet-pt2]",
    "test_export.py::test_whole_networks[mobile-onnx",
    "test_export.py::test_whole_networks[stages-openvino",
    "test_export.py::test_whole_networks[stages-pt2",
    "test_fuse.py::test_a_compiled_graph[True-oneDNN]",
    "test_fuse.py::test_a_compiled_graph[True-by size]",
    "test_fuse.py::test_each_variant_is_the_same_function[groupmixformer_base",
    "test_fuse.py::test_each_variant_is_the_same_function[groupmixformer_large",
    "test_fuse.py::test_golden_values_compiled[compile-oneDNN]",
    "test_fuse.py::test_golden_values_compiled[compile-by size]",
    "test_fuse.py::test_golden_values_compiled[no graph break",
    "test_fuse.py::test_golden_values_frozen_by_inductor[first size-oneDNN]",
    "test_fuse.py::test_golden_values_frozen_by_inductor[second size",
    "test_fuse.py::test_gradients_of_the_images[compiled-by size]",
    "test_kernels.py::test_more_kernels_under_the_interpreter",
    "test_quantize.py::test_the_command[openvino-static]",
    "test_quantize.py::test_images_whose_last_map_is_one_token",
    "test_quantize.py::test_the_command[pt2",
    "test_scale.py::test_a_run_killed_at_random",
    "test_scale.py::test_a_terminated_job_is_saved_and_continues[fsdp]",
    "test_scale.py::test_processes_compute_what_one_does[fsdp]",
    "test_scale.py::test_processes_compute_what_one_does[two nodes]",
    "test_scale.py::test_what_happens_to_one_process_counts_for_all[fsdp]",
    "test_segmentation.py::test_two_processes_measure_what_one_does",
    "test_training.py::test_a_compiled_model_has_the_same_losses",
    "test_training.py::test_losses_are_the_same_with[--precision bf16",
    "test_training.py::test_losses_are_the_same_with[--strategy fsdp",
    "test_variants.py::test_200_random_forward_passes",
    "test_variants.py::test_a_released_checkpoint_of_each_variant_predicts[groupmixformer_base",
    "test_variants.py::test_a_released_checkpoint_of_each_variant_predicts[groupmixformer_large",
)


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.nodeid.rpartition("tests/")[2]
        if name.startswith(SLOW + EXHAUSTIVE):
            item.add_marker(pytest.mark.slow)
        if name.startswith(EXHAUSTIVE):
            item.add_marker(pytest.mark.exhaustive)


GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"  # data and larger golden values beside a development checkout


def rebuild_weights(shapes):
    """Return a tensor for every name and shape by the rule of the golden values: random, but the same everywhere."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            value = np.array(100)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(("running_mean", "bias")):
            value = rng.normal(0, 0.1, shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.as_tensor(value.astype("int64" if value.ndim == 0 else "float32"))
    return weights


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared():
    """Give the path of something under ../shared, or skip the test."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"needs {SHARED / name}, which comes with a development checkout")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def write_digits():
    """Give a function that writes scikit-learn's digits 0, 1, ... as a folder of images, with so many of each class."""

    def write(root, names, train, val, size=(40, 36)):
        images, labels = load_digits(return_X_y=True)
        for digit, name in enumerate(names):
            chosen = images[labels == digit][: train + val].reshape(-1, 8, 8) * 15.9
            for i, pixels in enumerate(chosen):
                folder = root / ("train" if i < train else "val") / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).resize(size).save(folder / f"{i}.png")
        return root

    return write


@pytest.fixture(scope="session")
def photos(write_digits, tmp_path_factory):
    """Two classes of real images, scikit-learn's zeros and ones, as an image folder."""
    return write_digits(tmp_path_factory.mktemp("photos"), ["zero", "one"], train=12, val=8)


@pytest.fixture(scope="session")
def randomise():
    """Give a module the weights of `rebuild_weights`: a fresh module's are near zero and would hide errors."""

    def apply(module):
        module.load_state_dict(rebuild_weights({name: tensor.shape for name, tensor in module.state_dict().items()}))
        return module

    return apply


@pytest.fixture(scope="session")
def golden(shared):
    """Load golden values by name; `test` ships with the package, `mobile` and `small` are skipped where they are missing."""

    @functools.cache
    def load(name):
        folder = GOLDEN if (GOLDEN / f"{name}.json").is_file() else shared(f"golden/{name}.json").parent
        content = json.loads((folder / f"{name}.json").read_text())
        config = content["config"]
        arguments = {
            "embed_dims": config["embedding_dims"],
            "depths": config["serial_depths"],
            "mlp_ratios": config["mlp_ratios"],
            "num_classes": content["num_classes"],
        }
        weights = rebuild_weights(dict(content["keys"]))  # by the release's names

        def model():
            built = GroupMixFormer(**arguments)
            built.load_state_dict(checkpoint_filter_fn(weights))
            return built.eval()

        def images(case):
            values = np.random.default_rng(case["seed"]).normal(0, 1, case["shape"])
            return torch.as_tensor(values.astype("float32"))

        with np.load(folder / f"{name}.npz") as arrays:
            values = {key: torch.as_tensor(array) for key, array in arrays.items()}
        return SimpleNamespace(
            arguments=arguments, weights=weights, model=model, images=images, arrays=values, **{**content, "config": config}
        )

    return load


@pytest.fixture(scope="session")
def released_names():
    """Give the release's names of parameters: the other way round than the package's own table, and written apart from it."""

    def rename(names):
        """Names that the release uses, from ours: the other way round than the package's own table."""
        replacements = (
            (r"^stem\.conv", "conv_stem.proj"),
            (r"^stem\.", "conv_stem."),
            (r"^stages\.(\d+)\.patch_embed\.norm", r"patch_embed_layers.\1.norm"),
            (r"^stages\.(\d+)\.patch_embed\.", r"patch_embed_layers.\1.proj."),
            (r"^stages\.(\d+)\.blocks\.", r"groupmixformer_backbone.\1.gma_stage."),
            (r"\.cpe\.", ".cpe.proj."),
            (r"\.attn\.aggregators\.(\d)\.norm", r".att.aggregator.norm\1"),
            (r"\.attn\.aggregators\.", ".att.aggregator.agg"),
            (r"\.attn\.non_attention\.norm", ".att.aggregator.agg0.norm"),
            (r"\.attn\.non_attention\.", ".att.aggregator.agg0.conv."),
            (r"\.attn\.position\.conv3", ".att.crpe.conv_list.0"),
            (r"\.attn\.position\.conv5", ".att.crpe.conv_list.1"),
            (r"\.attn\.position\.conv7", ".att.crpe.conv_list.2"),
            (r"\.attn\.", ".att."),
            (r"\.depthwise\.", ".conv1."),
            (r"\.pointwise\.", ".pointwise_conv."),
            (r"^norm\.", "norm4."),
            (r"^head\.fc\.", "head."),
        )
        for name in names:
            for pattern, theirs in replacements:
                name = re.sub(pattern, theirs, name)
            yield name

    return rename
