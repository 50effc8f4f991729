# A linear layer on each frozen token of the last block, brought to the size of the image. DINOv2's probe has a
# BatchNorm in between; here the scale and shift of the ViT's last LayerNorm learn, which the head could take over too.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', bgr_to_rgb=True, pad_val=0, seg_pad_val=255, test_cfg=dict(size_divisor=16)),
    decode_head=dict(
        type='FCNHead', in_channels=1024, channels=1024, num_convs=0, concat_input=False, dropout_ratio=0.0,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
