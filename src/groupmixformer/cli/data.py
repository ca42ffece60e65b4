"""gmf data: what a data set holds, before it is trained on."""

from pathlib import Path
from typing import Annotated

from ..files import write_file
from .common import (
    EXTRAS,
    File,
    Json,
    Option,
    PathText,
    Positive,
    Reads,
    Root,
    UsageError,
    Works,
    Writes,
    command,
    progress,
    show,
    tell,
)


@command("data", "gmf data photos --page photos.html", *EXTRAS)
def data(
    path: Annotated[Reads[PathText], Option(metavar="PATH")],
    *,
    task: Works[str] = "",
    root: Root = "data",
    recipe: Reads[str | None] = None,
    statistics: Works[bool] = False,
    in_chans: Works[Positive | None] = None,
    channels_first: Works[bool | None] = None,
    page: Writes[File | None] = None,
    json: Json = False,
) -> None:
    """Tell what a data set holds: format, classes, sizes, damage, duplicates within and between its parts.

    Args:
        path: folder or file of a data set; of wds/NAME, hfids/NAME and hfds/NAME the first 1,000 images of a part
        task: classification, detection, segmentation; the first that the format serves by default
        recipe: whose augmentation the page shows; one that is shipped for the task by default
        statistics: compute mean and std of each channel over the training images, and print them as lines of a recipe
        in_chans: for --statistics: channels of the images; by default as files have them, images files as colour
        channels_first: for --statistics: whether the first axis of arrays is that of the channels
        page: write a page of it (.html), with annotated images and a batch as training sees it
    """
    from ..tasks.survey import Survey, channel_statistics, sample_stream
    from ..training.recipe import RecipeError, read_recipe

    if path.startswith(("wds/", "hfids/", "hfds/")) and not Path(path).exists():
        if page or recipe or task or statistics:
            raise UsageError(
                f"{path}: --page, --recipe, --task and --statistics are for folders and files, and not for streams"
            )
        result, text = sample_stream(path, root)
        show(result, json, text)
        return
    if statistics:
        result, text = channel_statistics(path, task, in_chans, channels_first)
        tell([], result["skipped"])
        show(result, json, text)
        return
    if in_chans or channels_first is not None:
        raise UsageError("--in-chans and --channels-first are for --statistics")
    survey = Survey(path, task, progress)
    if page:
        try:
            chosen = read_recipe(recipe or survey.task.example_recipe, ["--data", path])
        except RecipeError as error:
            raise UsageError(str(error)) from error
        page.parent.mkdir(parents=True, exist_ok=True)
        write_file(page, survey.page(chosen))
    result = survey.result | {"page": str(page) if page else None}
    show(result, json, survey.text + (f"\npage   {page}" if page else ""))
