"""Labelled images in the forms they come in."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(number, size=(20, 16)):
    """Noise of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(number):
    return encode(picture(number))


def write_folder(root, images):
    """Files by path below the root."""
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_parquet(path, rows, *, group=3, names=None, image="image", label="label"):
    """Rows of (bytes, label), as the datasets library writes them."""
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": data, "path": f"{number}.png"} for number, (data, _) in enumerate(rows)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({image: pyarrow.array(images, kind), label: [label for _, label in rows]})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path


def write_tar(path, members):
    """Members by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
