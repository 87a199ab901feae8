"""Where tools put images and annotations."""

import json

NAMES = ("dog", "cat", "tür")


def data_yaml(names="", more=""):
    return f"train: ../train/images\nval: ../valid/images\nnc: 3\nnames: {names or json.dumps(NAMES)}\n{more}"


# name: files of one image, other files, the lists that are found
LAYOUTS = {
    "VOC": ("JPEGImages/{0}.jpg Annotations/{0}.xml", {}, False),
    "flat": ("{0}.jpg {0}.xml", {"classes.txt": "dog\ncat"}, False),
    "lower-case": ("images/{0}.jpg annotations/{0}.xml", {"images/readme.txt": "x"}, False),
    "masks beside them": ("images/{0}.jpg annotations/xmls/{0}.xml masks/{0}.png", {}, False),
    "capitals and a folder above": ("data/IMAGES/{0}.jpg data/Annotations/{0}.xml", {}, False),
    "Roboflow": ("{1}/{0}.jpg {1}/{0}.xml", {"README.roboflow.txt": "x"}, True),
    "splits of VOC folders": ("{1}/JPEGImages/{0}.jpg {1}/Annotations/{0}.xml", {}, True),
    "VOC folder with splits below": ("JPEGImages/{1}/{0}.jpg Annotations/{1}/{0}.xml", {}, True),
    "splits below": ("images/{1}/{0}.jpg annotations/{1}/{0}.xml", {}, True),
    "XML beside images in splits": ("images/{1}/{0}.jpg images/{1}/{0}.xml", {}, True),
    "YOLO below": ("images/{1}/{0}.jpg labels/{1}/{0}.txt", {"data.yaml": data_yaml()}, True),
    "YOLO above": ("{1}/images/{0}.jpg {1}/labels/{0}.txt", {"data.yaml": data_yaml()}, True),
    "YOLO by years": ("set/images/{1}2017/{0}.jpg set/labels/{1}2017/{0}.txt", {"set.yaml": data_yaml()}, True),
    "YOLO of labelImg": ("{0}.jpg {0}.txt", {"classes.txt": "dog\ncat\ntür\n"}, False),
    "YOLO with numbered names": (
        "images/{0}.jpg labels/{0}.txt",
        {"x.yml": data_yaml("{0: dog, 1: cat, 2: tür}"), "labels/classes.txt": "other"},
        False,
    ),
    "Darknet": (
        "obj_train_data/{0}.jpg obj_train_data/{0}.txt",
        {"obj.names": "dog\ncat\ntür\n", "train.txt": "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n"},
        None,
    ),
}
