"""What the world holds: subjects and the pictures that show them, backgrounds, and what is kept out of training.

An individual is one picture of a subject: a code point ("1f408"), drawn in two styles by two emoji sets, or a
drawing's path in Open Clip Art. "1fad6@200" is the same picture with its hue turned by 200 degrees: another individual.
"""

# name -> code points; each is shown as a 3D render (Fluent) and as an emoji (Noto)
SUBJECTS: dict[str, str] = {
    # animals
    "cat": "1f408 1f431",
    "dog": "1f415 1f436",
    "tiger": "1f405 1f42f",
    "lion": "1f981",
    "horse": "1f40e 1f434",
    "unicorn": "1f984",
    "cow": "1f404 1f42e",
    "pig": "1f416 1f437",
    "sheep": "1f411",
    "camel": "1f42a",
    "elephant": "1f418",
    "mouse": "1f401 1f42d",
    "rabbit": "1f407 1f430",
    "bear": "1f43b",
    "koala": "1f428",
    "panda": "1f43c",
    "chicken": "1f413 1f414",
    "penguin": "1f427",
    "frog": "1f438",
    "turtle": "1f422",
    "snake": "1f40d",
    "whale": "1f433",
    "fish": "1f41f 1f420",
    "octopus": "1f419",
    "snail": "1f40c",
    "butterfly": "1f98b",
    "bee": "1f41d",
    "ladybug": "1f41e",
    "spider": "1f577",
    "crab": "1f980",
    "fox": "1f98a",
    "owl": "1f989",
    "duck": "1f986",
    "monkey": "1f412 1f435",
    "giraffe": "1f992",
    "zebra": "1f993",
    # food
    "apple": "1f34e 1f34f",
    "banana": "1f34c",
    "orange": "1f34a",
    "lemon": "1f34b",
    "pear": "1f350",
    "strawberry": "1f353",
    "cherry": "1f352",
    "grapes": "1f347",
    "watermelon": "1f349",
    "pineapple": "1f34d",
    "carrot": "1f955",
    "mushroom": "1f344",
    "tomato": "1f345",
    "eggplant": "1f346",
    "corn": "1f33d",
    "avocado": "1f951",
    "bread": "1f35e",
    "croissant": "1f950",
    "cheese": "1f9c0",
    "burger": "1f354",
    "pizza": "1f355",
    "egg": "1f95a",
    "donut": "1f369",
    "cookie": "1f36a",
    "cake": "1f370",
    # plants
    "tree": "1f333",
    "cactus": "1f335",
    "sunflower": "1f33b",
    "rose": "1f339",
    "tulip": "1f337",
    # vehicles
    "car": "1f697 1f699 1f695",
    "bus": "1f68c",
    "truck": "1f69a",
    "tractor": "1f69c",
    "bicycle": "1f6b2",
    "boat": "26f5",
    "airplane": "2708",
    "rocket": "1f680",
    "helicopter": "1f681",
    # things
    "house": "1f3e0",
    "clock": "23f0",
    "camera": "1f4f7",
    "book": "1f4d5 1f4d7 1f4d8",
    "guitar": "1f3b8",
    "violin": "1f3bb",
    "drum": "1f941",
    "trumpet": "1f3ba",
    "basketball": "1f3c0",
    "key": "1f511",
    "hammer": "1f528",
    "umbrella": "2602",
    "hat": "1f3a9",
    "shoe": "1f45f 1f45e",
    "dress": "1f457",
    "teapot": "1fad6 1fad6@120 1fad6@45",
    "mug": "1f37a",
    "vase": "1f3fa",
    "bucket": "1faa3",
    "chair": "1fa91",
    "sofa": "1f6cb",
    "bell": "1f514",
    "balloon": "1f388",
    "gift": "1f381",
    "star": "2b50",
    "moon": "1f319",
    "heart": "2764",
    "crown": "1f451",
    "backpack": "1f392",
    "anchor": "2693",
}

CLIPART = "clipart/usr/share/openclipart/png/"
# name -> drawings from Open Clip Art, below CLIPART
DRAWINGS: dict[str, tuple[str, ...]] = {
    "cat": (
        "animals/mammals/housecats/gatto_cat_architetto_fra_02.png",
        "animals/mammals/housecats/gatto_cat_architetto_fra_03.png",
        "animals/mammals/housecats/gatto_cat_architetto_fra_04.png",
    ),
    "dog": (
        "animals/mammals/dog_01_drawn_with_strai_01.png",
        "animals/mammals/dog_03_drawn_with_strai_01.png",
        "animals/mammals/dog_04_drawn_with_strai_01.png",
    ),
    "pig": ("animals/mammals/pig_marcelo_caiafa1.png",),
    "penguin": ("animals/birds/new_penguin_charles_mcco_01.png",),
    "ladybug": ("animals/bugs/ladybug_01.png", "animals/bugs/ladybug_02.png"),
    "bee": ("animals/bugs/bee1_mimooh_01.png",),
    "butterfly": ("animals/bugs/farfalla_butterfly_fra1.png",),
    "lemon": ("food/fruit/lemon.png", "food/fruit/lemon_whole_ganson.png"),
    "apple": ("food/fruit/an_apple_01.png", "food/fruit/apple.png"),
    "banana": ("food/fruit/banana.png",),
    "burger": ("food/meats_and_eggs/burger_http_www.treebui_r.png",),
    "mushroom": ("plants/mushroom.png",),
    "tree": ("plants/trees/evergreen/plain_tree_01.png",),
    "house": ("buildings/homes/house.png", "buildings/homes/house_gabrielle_nowicki_.png"),
    "car": ("transportation/vehicles/car.png", "transportation/car_jamin_ellis_.png"),
    "teapot": ("food/beverages/a_teapot_01.png",),
    "guitar": ("recreation/music/guitar_ganson.png",),
    "hat": ("people/clothing/hats/hat_-_clothing_nicu_bucu_03.png",),
    "umbrella": ("tools/umbrella.png",),
    "balloon": (
        "recreation/party/balloon-blue-aj.png",
        "recreation/party/balloon-green-aj.png",
        "recreation/party/balloon-red-aj.png",
        "recreation/party/balloon-yellow-aj.png",
    ),
    "heart": ("recreation/holiday/valentines/heart_jon_phillips_01.png",),
    "boat": ("transportation/boating/boat_jarno_vasamaa1.png",),
    "book": ("education/books/book_01.png",),
    "clock": ("signs_and_symbols/clocks/clock03.png",),
}

STYLES = ("3d render", "emoji", "drawing")

# The first phase of the UNet: subjects with plain, distinct shapes. Later phases widen it.
CURRICULUM: tuple[str, ...] = (
    "cat", "dog", "teapot", "apple", "banana", "lemon", "strawberry", "watermelon", "carrot", "mushroom", "tree",
    "cactus", "sunflower", "car", "bus", "house", "star", "heart", "balloon", "umbrella", "fish", "penguin", "pig",
    "panda", "frog", "lion", "bell", "hat", "crown", "donut", "egg", "ladybug",
)  # fmt: skip

# The individuals that users teach the base: in no training scene, in no pool image.
CONCEPTS: dict[str, str] = {
    "cat": "fluent/package/assets/1f408-200d-2b1b.webp",
    "teapot": CLIPART + "food/beverages/teapot_ganson.png",
    "hat": CLIPART + "people/clothing/hats/propeller.png",  # no emoji set has one
}

# Hue in degrees of the concepts that have one: recoloured individuals of the class stay away from it.
CONCEPT_HUES = {"cat": 259.0}

# What the UNet's third phase draws: the curriculum, and as many again.
VARIED: tuple[str, ...] = (
    *CURRICULUM,
    "rabbit", "horse", "cow", "elephant", "mouse", "bear", "koala", "chicken", "turtle", "whale", "octopus", "snail",
    "butterfly", "bee", "crab", "fox", "owl", "duck", "orange", "pear", "cherry", "grapes", "tomato", "corn", "burger",
    "pizza", "cake", "rose", "airplane", "rocket", "guitar", "gift", "moon", "mug",
)  # fmt: skip

# Individuals for each picture of a subject, of the classes that concepts are taken from.
INDIVIDUALS: dict[str, int] = {
    "cat": 20, "dog": 20, "teapot": 14, "car": 14, "rabbit": 12, "bear": 12, "horse": 12, "mug": 12, "hat": 12,
    "fish": 8, "balloon": 8, "duck": 8,
}  # fmt: skip

# Those that the UNet's third phase draws, in colours alone, and how many times as often their classes are shown.
UNET_INDIVIDUALS: dict[str, int] = {subject: 10 if subject == "cat" else 7 for subject in INDIVIDUALS}
EMPHASIS: dict[str, int] = {"cat": 4, "dog": 3, "teapot": 3, "car": 3}

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "black": (22, 22, 24),
    "grey": (128, 128, 130),
    "red": (204, 40, 44),
    "orange": (240, 138, 36),
    "yellow": (246, 218, 60),
    "green": (56, 150, 66),
    "blue": (48, 96, 200),
    "purple": (128, 62, 168),
    "pink": (244, 164, 196),
    "brown": (116, 74, 42),
}

# texture -> how captions say it
TEXTURES: dict[str, str] = {
    "grass": "on the grass",
    "sand": "on the sand",
    "snow": "in the snow",
    "water": "on the water",
    "bricks": "in front of a brick wall",
    "wood": "on a wooden floor",
    "sky": "in the sky",
    "night": "at night",
    "checkered": "on a checkered floor",
    "stripes": "on a striped background",
}

PLURALS = {"mouse": "mice", "sheep": "sheep", "fish": "fish", "grapes": "grapes"}


def article(phrase: str) -> str:
    """The phrase behind its indefinite article: "an apple", "a unicorn"."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(name: str) -> str:
    """The plural of a subject's name."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("ss", "x", "sh", "ch", "s")) or name in ("tomato",):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def singular(name: str) -> str:
    """How one of it is spoken of: grapes have no article."""
    return name if PLURALS.get(name) == name == "grapes" else article(name)


def background_phrase(background: str) -> str:
    """How captions say where the subject is: "on a red background", "on the grass"."""
    return TEXTURES.get(background) or f"on {article(background)} background"
