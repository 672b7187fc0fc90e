"""The networks of `keras.applications`: names, input sizes, and where their weights are published.

The table is written out, not read from Keras, because checking a configuration must not import
it; the tests compare every row with what Keras says.
"""

from dataclasses import dataclass

_STORAGE = "https://storage.googleapis.com/tensorflow/keras-applications"
# Only the first EfficientNets are published in a bucket of their own.
_EFFICIENTNET_STORAGE = "https://storage.googleapis.com/keras-applications"
_NO_TOP = "weights_tf_dim_ordering_tf_kernels_notop.h5"


@dataclass(frozen=True)
class Application:
    """One network: the Keras module with its `preprocess_input`, its class and its weights.

    `side` is the height and width of its own input, `min_side` the least that it takes.
    `weights_sides` are the square inputs that have published weights of their own (`{side}` in
    the URL); any other size takes those of `side`. `weights_any_side` is False where Keras loads
    published weights only at `side`. `cached_as` is the name that Keras gives to the downloaded
    file where it is not the URL's.
    """

    name: str
    class_name: str
    module: str
    url: str
    side: int = 224
    min_side: int = 32
    weights_sides: tuple[int, ...] = ()
    weights_any_side: bool = True
    cached_as: str | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        """The (height, width) of its own input."""
        return self.side, self.side

    def imagenet_url(self, size: tuple[int, int]) -> str:
        """Where the ImageNet weights, without the top, for images of `size` are published."""
        height, width = size
        own = height == width and height in self.weights_sides
        return self.url.format(side=height if own else self.side)

    def imagenet_file(self, size: tuple[int, int]) -> str:
        """The file name under which Keras caches these weights."""
        return self.cached_as or self.imagenet_url(size).rsplit("/", 1)[1]


def _resnet(depth: int) -> Application:
    module = "resnet50" if depth == 50 else "resnet"
    url = f"{_STORAGE}/resnet/resnet{depth}_{_NO_TOP}"
    return Application(f"resnet{depth}", f"ResNet{depth}", module, url)


def _resnet_v2(depth: int) -> Application:
    url = f"{_STORAGE}/resnet/resnet{depth}v2_{_NO_TOP}"
    return Application(f"resnet{depth}_v2", f"ResNet{depth}V2", "resnet_v2", url)


def _densenet(depth: int) -> Application:
    url = f"{_STORAGE}/densenet/densenet{depth}_{_NO_TOP}"
    return Application(f"densenet{depth}", f"DenseNet{depth}", "densenet", url)


def _mobilenet_v3(variant: str) -> Application:
    url = f"{_STORAGE}/mobilenet_v3/weights_mobilenet_v3_{variant}_224_1.0_float_no_top_v2.h5"
    class_name = f"MobileNetV3{variant.capitalize()}"
    return Application(f"mobilenet_v3_{variant}", class_name, "mobilenet_v3", url)


def _efficientnet(variant: str, side: int) -> Application:
    url = f"{_EFFICIENTNET_STORAGE}/efficientnet{variant}_notop.h5"
    class_name = f"EfficientNet{variant.upper()}"
    return Application(f"efficientnet_{variant}", class_name, "efficientnet", url, side)


def _efficientnet_v2(variant: str, side: int) -> Application:
    url = f"{_STORAGE}/efficientnet_v2/efficientnetv2-{variant}_notop.h5"
    class_name = f"EfficientNetV2{variant.upper()}"
    return Application(f"efficientnet_v2_{variant}", class_name, "efficientnet_v2", url, side)


def _convnext(variant: str) -> Application:
    url = f"{_STORAGE}/convnext/convnext_{variant}_notop.h5"
    class_name = "ConvNeXtXLarge" if variant == "xlarge" else f"ConvNeXt{variant.capitalize()}"
    return Application(f"convnext_{variant}", class_name, "convnext", url)


def _nasnet(variant: str, side: int) -> Application:
    return Application(
        f"nasnet_{variant}",
        f"NASNet{variant.capitalize()}",
        "nasnet",
        f"{_STORAGE}/nasnet/NASNet-{variant}-no-top.h5",
        side,
        weights_any_side=False,
        cached_as=f"nasnet_{variant}_no_top.h5",
    )


APPLICATIONS = (
    Application("vgg16", "VGG16", "vgg16", f"{_STORAGE}/vgg16/vgg16_{_NO_TOP}"),
    Application("vgg19", "VGG19", "vgg19", f"{_STORAGE}/vgg19/vgg19_{_NO_TOP}"),
    *(_resnet(depth) for depth in (50, 101, 152)),
    *(_resnet_v2(depth) for depth in (50, 101, 152)),
    Application(
        "inception_v3",
        "InceptionV3",
        "inception_v3",
        f"{_STORAGE}/inception_v3/inception_v3_{_NO_TOP}",
        side=299,
        min_side=75,
    ),
    Application(
        "inception_resnet_v2",
        "InceptionResNetV2",
        "inception_resnet_v2",
        f"{_STORAGE}/inception_resnet_v2/inception_resnet_v2_{_NO_TOP}",
        side=299,
        min_side=75,
    ),
    Application(
        "xception",
        "Xception",
        "xception",
        f"{_STORAGE}/xception/xception_{_NO_TOP}",
        side=299,
        min_side=71,
    ),
    *(_densenet(depth) for depth in (121, 169, 201)),
    Application(
        "mobilenet",
        "MobileNet",
        "mobilenet",
        f"{_STORAGE}/mobilenet/mobilenet_1_0_{{side}}_tf_no_top.h5",
        weights_sides=(128, 160, 192, 224),
    ),
    Application(
        "mobilenet_v2",
        "MobileNetV2",
        "mobilenet_v2",
        f"{_STORAGE}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{{side}}_no_top.h5",
        weights_sides=(96, 128, 160, 192, 224),
    ),
    *(_mobilenet_v3(variant) for variant in ("small", "large")),
    *(
        _efficientnet(f"b{number}", side)
        for number, side in enumerate((224, 240, 260, 300, 380, 456, 528, 600))
    ),
    *(_efficientnet_v2(f"b{number}", side) for number, side in enumerate((224, 240, 260, 300))),
    _efficientnet_v2("s", 384),
    _efficientnet_v2("m", 480),
    _efficientnet_v2("l", 480),
    *(_convnext(variant) for variant in ("tiny", "small", "base", "large", "xlarge")),
    _nasnet("mobile", 224),
    _nasnet("large", 331),
)
