"""Flax Linen modules to distil from and into. Anything else that is a Flax module will do as well.

Paths of features are the same in all of them, and recipes look for these names: the stages, `stage1` (of transformers `block0`,
of dense networks `hidden0`); of convolutional stages `stage1/preact`, the sum before the stage's last ReLU, with the shortcut
added and before any pooling, and the stage itself where no ReLU ends it; and `pooled`, the embedding [batch, channels] before
the head.

    >>> import jax, jax.numpy as jnp
    >>> from kdjax import networks
    >>> network = networks.from_linen(ResNet(8), features=('stage3', 'stage3/preact', 'pooled'))
    >>> variables = jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
    >>> outputs, _ = jax.eval_shape(network.apply, variables, jnp.ones((2, 32, 32, 3)))
    >>> outputs.features['stage3/preact'].shape, outputs.features['pooled'].shape
    ((2, 8, 8, 64), (2, 64))
"""

from kdjax.models._cnn import CNN
from kdjax.models._convolutions import cpu_convolution, im2col_convolution
from kdjax.models._decoder import Decoder
from kdjax.models._encoder import Encoder
from kdjax.models._layers import Convolution, max_pool
from kdjax.models._mlp import MLP
from kdjax.models._mobilenet import MobileNetV2
from kdjax.models._narrowing import narrow
from kdjax.models._resnet import ResNet, ResNet18
from kdjax.models._shufflenet import ShuffleNet, ShuffleNetV2
from kdjax.models._squeezenet import SqueezeNet
from kdjax.models._stems import Stem
from kdjax.models._transformer import VisionTransformer
from kdjax.models._vgg import VGG
from kdjax.models._wide_resnet import WideResNet
from kdjax.models._winograd import winograd_convolution

__all__ = [
    'CNN',
    'MLP',
    'VGG',
    'Convolution',
    'Decoder',
    'Encoder',
    'MobileNetV2',
    'ResNet',
    'ResNet18',
    'ShuffleNet',
    'ShuffleNetV2',
    'SqueezeNet',
    'Stem',
    'VisionTransformer',
    'WideResNet',
    'cpu_convolution',
    'im2col_convolution',
    'max_pool',
    'narrow',
    'winograd_convolution',
]
