"""Flax Linen modules to distil from and into. Anything else that is a Flax module will do as well."""

from kdjax.models.cnn import CNN as CNN
from kdjax.models.convolutions import cpu_convolution as cpu_convolution
from kdjax.models.convolutions import im2col_convolution as im2col_convolution
from kdjax.models.layers import Convolution as Convolution
from kdjax.models.mlp import MLP as MLP
from kdjax.models.mobilenet import MobileNetV2 as MobileNetV2
from kdjax.models.narrowing import narrow as narrow
from kdjax.models.resnet import ResNet as ResNet
from kdjax.models.resnet import ResNet18 as ResNet18
from kdjax.models.shufflenet import ShuffleNet as ShuffleNet
from kdjax.models.shufflenet import ShuffleNetV2 as ShuffleNetV2
from kdjax.models.squeezenet import SqueezeNet as SqueezeNet
from kdjax.models.stems import Stem as Stem
from kdjax.models.transformer import VisionTransformer as VisionTransformer
from kdjax.models.vgg import VGG as VGG
from kdjax.models.wide_resnet import WideResNet as WideResNet
from kdjax.models.winograd import winograd_convolution as winograd_convolution
