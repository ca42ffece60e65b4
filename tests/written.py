"""Data sets in COCO's form written in the formats of other tools, by what their documentation says."""

import json
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from PIL import Image


def load(root, split):
    """Return the content of annotations/instances_SPLIT.json, with the objects of each image and the name of each category."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    objects = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        if not record.get("iscrowd"):
            objects[record["image_id"]].append(record)
    return content["images"], objects, {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}


def place(root, image, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / Path(image["file_name"]).name).write_bytes((root / "images" / image["file_name"]).read_bytes())
    return folder / Path(image["file_name"]).name


def polygons(record):
    return record["segmentation"] if isinstance(record.get("segmentation"), list) else []


def yolo(root, out, splits, masks=False):
    for split in splits:
        images, objects, names = load(root, split)
        (out / "labels" / split).mkdir(parents=True)
        numbers = {key: number for number, key in enumerate(names)}
        for image in images:
            file = place(root, image, out / "images" / split)
            size, lines = (image["width"], image["height"]), []
            for record in objects[image["id"]]:
                x, y, w, h = record["bbox"]
                values = [x + w / 2, y + h / 2, w, h]
                values = polygons(record)[0] if masks and polygons(record) else values
                shares = [repr(value / size[i % 2]) for i, value in enumerate(values)]
                lines.append(" ".join([str(numbers[record["category_id"]]), *shares]))
            if lines:
                (out / "labels" / split / f"{file.stem}.txt").write_text("\n".join(lines) + "\n")
    listed = "".join(f"  {number}: {name}\n" for number, name in enumerate(names.values()))
    parts = "".join(f"{split}: images/{split}\n" for split in splits)
    (out / "data.yaml").write_text(f"path: .\n{parts}names:\n{listed}")


def voc(root, out, splits, first=1):
    """With ImageSets, as the devkit; pixels are counted from 1, the last one of a box included."""
    (out / "ImageSets" / "Main").mkdir(parents=True)
    (out / "Annotations").mkdir()
    for split in splits:
        images, objects, names = load(root, split)
        stems = []
        for image in images:
            file = place(root, image, out / "JPEGImages")
            found = ""
            for record in objects[image["id"]]:
                x, y, w, h = record["bbox"]
                corners = {"xmin": x + first, "ymin": y + first, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{name}>{value}</{name}>" for name, value in corners.items())
                name = f"<name>{escape(names[record['category_id']])}</name>"
                found += f"<object>{name}<difficult>0</difficult><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
            stems.append(file.stem)
            text = f"<annotation><filename>{escape(file.name)}</filename>{size}{found}</annotation>"
            (out / "Annotations" / f"{file.stem}.xml").write_text(text)
        (out / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))


def roboflow(root, out, splits):
    for split in splits:
        images, _, _ = load(root, split)
        folder = out / {"val": "valid"}.get(split, split)
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        for image, record in zip(images, content["images"], strict=True):
            record["file_name"] = place(root, image, folder).name
        over = {"id": 0, "name": "things", "supercategory": "none"}
        content["categories"] = [over, *({**category, "supercategory": "things"} for category in content["categories"])]
        (folder / "_annotations.coco.json").write_text(json.dumps(content))


def unsplit(root, out, splits):
    images, _, _ = load(root, splits[0])
    for image in images:
        place(root, image, out / "images")
    (out / "annotations").mkdir()
    (out / "annotations" / "instances_default.json").write_bytes(
        (root / "annotations" / f"instances_{splits[0]}.json").read_bytes()
    )


def labelme(root, out, splits):
    """Polygons, and rectangles by two corners, drawn from the lower right, as a mouse may."""
    for split in splits:
        images, objects, names = load(root, split)
        for image in images:
            file, shapes = place(root, image, out / split), []
            for number, record in enumerate(objects[image["id"]]):
                label = {"label": names[record["category_id"]], "flags": {}, "group_id": None}
                x, y, w, h = record["bbox"]
                parts = polygons(record)
                label["group_id"] = number if len(parts) > 1 else None
                shapes += [{**label, "points": list(zip(p[::2], p[1::2], strict=True)), "shape_type": "polygon"} for p in parts]
                if not parts:
                    shapes.append({**label, "points": [[x + w, y + h], [x, y]], "shape_type": "rectangle"})
            content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": file.name, "imageData": None}
            content |= {"imageHeight": image["height"], "imageWidth": image["width"]}
            file.with_suffix(".json").write_text(json.dumps(content))


def cvat(root, out, splits):
    found, names = "", {}
    for split in splits:
        images, objects, names = load(root, split)
        for image in images:
            file = place(root, image, out / "images" / split)
            size = f'width="{image["width"]}" height="{image["height"]}"'
            found += f'<image id="{image["id"]}" name={quoteattr(file.name)} subset="{split}" {size}>'
            for record in objects[image["id"]]:
                x, y, w, h = record["bbox"]
                about = f'label={quoteattr(names[record["category_id"]])} source="manual" occluded="0" z_order="0"'
                if parts := polygons(record):
                    points = ";".join(f"{a},{b}" for a, b in zip(parts[0][::2], parts[0][1::2], strict=True))
                    found += f'<polygon {about} points="{points}"></polygon>'
                else:
                    found += f'<box {about} xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"></box>'
            found += "</image>"
    labels = "".join(f"<label><name>{escape(name)}</name></label>" for name in names.values())
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    (out / "annotations.xml").write_text(f'<?xml version="1.0"?><annotations><version>1.1</version>{meta}{found}</annotations>')


FORMATS = {"yolo": yolo, "voc": voc, "roboflow": roboflow, "labelme": labelme, "cvat": cvat}


def damage(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


def blank(file, size=(40, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file)
