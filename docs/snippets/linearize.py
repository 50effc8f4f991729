import timm
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from adala_mm import align, linearize

teacher = timm.create_model('vit_base_patch14_dinov2.lvd142m', pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(teacher), is_training=True)
data = DataLoader(ImageFolder('images', transform), batch_size=32, shuffle=True)  # labels are not used
model = linearize(teacher, 'linear')  # a copy; logs '12 of 12 blocks linear'
align(model, teacher, data, stage=1, epochs=4, lr=3e-3)  # every attention answers as its softmax did
align(model, teacher, data, stage=2, epochs=30, loss_scale=5)  # the whole network as the teacher does
