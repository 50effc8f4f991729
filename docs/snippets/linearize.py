import timm
from timm.data.config import resolve_model_data_config
from timm.data.dataset import ImageDataset
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader

from adala_mm import align, linearize, save

teacher = timm.create_model('vit_base_patch14_dinov2.lvd142m', pretrained=True)
transform = create_transform(**resolve_model_data_config(teacher), is_training=True)
data = DataLoader(ImageDataset('images', transform=transform), batch_size=32, shuffle=True)  # labels are not used
model = linearize(teacher, 'linear')  # a copy; logs '12 of 12 blocks linear'
align(model, teacher, data, stage=1, epochs=4)  # every attention answers as its softmax did
align(model, teacher, data, stage=2, epochs=30, loss_scale=5)  # the whole network as the teacher does
save(model, 'linear.safetensors')  # adala_mm.load brings it back
