"""Code that a model card shows: how to use what was exported."""

ONNX_USE = """\
```python
import numpy as np
import onnxruntime
from PIL import Image

CLASSES = {classes}
image = Image.open("image.jpg").convert("RGB")
width, height = image.size
scale = min({min_size} / min(width, height), {max_size} / max(width, height)) if {min_size} else 1.0
resized = image.resize((int(width * scale + 0.5), int(height * scale + 0.5)), Image.Resampling.BILINEAR)
session = onnxruntime.InferenceSession("{file}")
pixels = np.asarray(resized).transpose(2, 0, 1)
boxes, scores, labels = session.run(["boxes", "scores", "labels"], {{"image": pixels}})
# back to pixels of the original
boxes /= np.array([resized.width / width, resized.height / height] * 2, dtype=np.float32)
for box, score, label in zip(boxes, scores, labels):
    print(CLASSES[label], score, box)
```

Normalization, padding and non-maximum suppression are in the graph; `image` is uint8, (3, height, width), RGB.
"""

PROGRAM_USE = """\
```python
import numpy as np
import torch
import torchvision
from PIL import Image

CLASSES = {classes}
image = Image.open("image.jpg").convert("RGB")
width, height = image.size
scale = min({min_size} / min(width, height), {max_size} / max(width, height)) if {min_size} else 1.0
resized = image.resize((int(width * scale + 0.5), int(height * scale + 0.5)), Image.Resampling.BILINEAR)
detector = torch.export.load("{file}").module()
pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
boxes, scores, labels = detector(pixels)
# back to pixels of the original
boxes = boxes / boxes.new_tensor([resized.width / width, resized.height / height] * 2)
for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
    print(CLASSES[label], score, box)
```

Normalization, padding and non-maximum suppression are in the program; `image` is uint8, (3, height, width), RGB.
"""

TIMM_USE = """\
```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True)
```

On the hub, `hf-hub:OWNER/NAME` takes the place of `local-dir:{name}`.
"""

OWN_ARCH_USE = """\
```python
import timm

import nst_det.backbones  # registers {arch} in timm

model = timm.create_model("{arch}", num_classes={num_classes}, checkpoint_path="{name}/model.safetensors")
```
"""

TORCHVISION_USE = """\
```python
import torch
import torchvision

model = torchvision.models.{arch}(num_classes={num_classes})
model.load_state_dict(torch.load("{name}", weights_only=True))
```
"""

DETECTRON2_USE = """\
```python
from detectron2.config import get_cfg
from detectron2.modeling import build_model

config = get_cfg()
# its MODEL.WEIGHTS names the weights, relative to where Detectron2 is started
config.merge_from_file("{config}")
model = build_model(config)
```
"""
