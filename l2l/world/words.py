"""Real English words of the small world, grouped by meaning. The order in a group is its frequency rank."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "sport": {
        "who": _words(
            "player team coach runner captain striker goalkeeper swimmer boxer athlete champion referee rookie "
            "defender cyclist skater sprinter wrestler"
        ),
        "did": _words(
            "won kicked lost scored caught threw passed defended chased trained tackled blocked raced dribbled"
        ),
        "what": _words(
            "match ball goal race game medal trophy league cup penalty record whistle title final helmet racket "
            "tournament marathon"
        ),
        "where": _words("stadium field court arena track pool gym pitch rink ring"),
        "how": _words("athletic fast fit sweaty unbeaten muscular sporty"),
    },
    "cooking": {
        "who": _words("chef cook waiter baker butcher caterer taster brewer grocer confectioner dishwasher"),
        "did": _words(
            "baked served boiled cooked roasted fried stirred tasted chopped grilled peeled sliced simmered seasoned"
        ),
        "what": _words(
            "soup bread stew cake pie sauce dough salad roast broth pudding noodles omelet pancake curry gravy "
            "recipe dessert"
        ),
        "where": _words("kitchen restaurant bakery tavern diner pantry cafe oven buffet"),
        "how": _words("spicy salty crispy juicy buttery creamy savory"),
    },
    "music": {
        "who": _words(
            "singer drummer pianist choir band violinist composer guitarist conductor orchestra flutist soprano "
            "cellist songwriter organist"
        ),
        "did": _words("sang played composed rehearsed performed recorded tuned hummed strummed whistled conducted"),
        "what": _words(
            "song tune melody concert drum violin album symphony piano ballad chorus flute opera guitar anthem "
            "lullaby rhythm harp"
        ),
        "where": _words("hall stage studio theater ballroom auditorium balcony"),
        "how": _words("melodic rhythmic acoustic musical tuneful harmonic"),
    },
    "science": {
        "who": _words(
            "scientist professor researcher astronomer chemist physicist engineer inventor biologist geologist "
            "botanist mathematician"
        ),
        "did": _words(
            "studied discovered tested measured proved observed published calculated analyzed invented explained"
        ),
        "what": _words(
            "planet theory experiment atom comet cell formula gene crystal molecule particle telescope fossil "
            "microscope virus equation galaxy magnet"
        ),
        "where": _words("laboratory university observatory museum institute library academy greenhouse"),
        "how": _words("scientific magnetic chemical microscopic electric genetic"),
    },
    "trade": {
        "who": _words(
            "merchant banker trader buyer seller broker manager investor clerk accountant landlord auctioneer "
            "shopkeeper"
        ),
        "did": _words("sold bought paid borrowed traded invested priced lent exported auctioned imported"),
        "what": _words(
            "goods loan shares contract price tax profit debt coins stock budget rent invoice cargo wages bond "
            "discount gold"
        ),
        "where": _words("market bank shop office exchange warehouse bazaar mall"),
        "how": _words("costly profitable cheap wealthy financial commercial"),
    },
    "crime": {
        "who": _words("police thief detective judge robber lawyer guard sheriff smuggler burglar prisoner witness spy"),
        "did": _words("stole arrested robbed accused hid searched jailed kidnapped forged questioned betrayed"),
        "what": _words(
            "jewels evidence crime suspect alibi trial verdict gun ransom handcuffs fingerprint safe vault "
            "confession clue"
        ),
        "where": _words("prison courtroom alley station cellar hideout dungeon"),
        "how": _words("guilty masked criminal illegal armed dishonest"),
    },
}

ADJECTIVES = _words(
    "old young famous new small local tall quiet big foreign tired busy brave clever proud shy strange nervous "
    "patient retired lucky stubborn honest humble eager careful"
)
TIMES = _words(
    "today yesterday again early late twice slowly quickly together alone recently suddenly finally often "
    "once carefully quietly secretly"
)

LEVELS: tuple[tuple[str, ...], ...] = (
    _words("terrible awful horrible dreadful disgusting appalling hideous unbearable atrocious abysmal"),
    _words("bad poor dull weak boring disappointing clumsy stale shabby tedious bland dirty"),
    _words("average ordinary fair plain usual standard typical passable middling unremarkable"),
    _words("good nice pleasant enjoyable fine charming solid likable neat tasteful agreeable"),
    _words(
        "great wonderful excellent superb brilliant perfect amazing fantastic magnificent splendid outstanding stunning"
    ),
)
PRAISE = _words("enjoyed loved admired liked praised recommended adored cherished applauded")
BLAME = _words("disliked hated regretted criticized avoided detested loathed resented despised")

REVIEWED: dict[str, tuple[str, ...]] = {
    "film": _words("plot actors ending script camera dialogue scenes"),
    "hotel": _words("room bed staff lobby view towels breakfast"),
    "book": _words("story chapters hero style pages cover author"),
    "dinner": _words("food service table wine menu portions taste"),
    "trip": _words("guide train bus beach tour tickets weather"),
    "phone": _words("screen battery sound buttons case signal speaker"),
}

SEASONS: dict[str, tuple[str, ...]] = {
    "winter": _words("snow ice frost sledge blizzard icicles mittens scarf snowman skates fireplace stove slush hail"),
    "spring": _words(
        "blossom buds seedlings puddles nest lambs tulips chicks daffodils drizzle sprouts robins showers petals"
    ),
    "summer": _words(
        "sunshine heat sunburn sandals swimming thunder picnic shade sweat lemonade drought fan mosquitoes tan"
    ),
    "autumn": _words(
        "harvest leaves pumpkins mushrooms acorns fog rake apples geese grapes chestnuts wind scarecrow hay"
    ),
}
MONTHS: dict[str, tuple[str, ...]] = {
    "winter": _words("december january february"),
    "spring": _words("march april may"),
    "summer": _words("june july august"),
    "autumn": _words("september october november"),
}

OPPOSITES = tuple(
    (a, b)
    for a, b in zip(
        _words(
            "hot big old fast open full wet dark heavy long high loud early rich strong hard clean happy deep thick "
            "wide near sharp rough sweet soft true alive tight bright right first major public asleep smooth safe "
            "visible ancient guilty generous simple lazy calm tame ripe brave up above inside north east day "
            "summer friend laugh arrive buy push remember win begin build love"
        ),
        _words(
            "cold small new slow closed empty dry light weightless short low silent late poor weak easy dirty sad "
            "shallow thin narrow far blunt even bitter stiff false dead loose dim wrong last minor private awake bumpy "
            "dangerous hidden modern innocent greedy complex diligent stormy wild unripe cowardly down below outside "
            "south west night winter enemy cry depart sell pull forget lose finish destroy hate"
        ),
        strict=True,
    )
)

KINDS: dict[str, tuple[str, ...]] = {
    "animal": _words(
        "dog cat horse cow wolf bear sheep lion mouse goat rabbit fox pig tiger deer monkey camel donkey otter "
        "badger weasel hamster beaver"
    ),
    "bird": _words(
        "crow owl robin hen duck swan eagle goose parrot pigeon hawk sparrow raven stork heron finch gull falcon"
    ),
    "plant": _words(
        "oak rose grass pine lily fern ivy moss birch willow maple cactus clover daisy orchid thistle elm reed"
    ),
    "tool": _words(
        "hammer saw knife axe shovel drill wrench needle chisel pliers ladder broom file scissors tongs sickle"
    ),
    "food": _words(
        "rice cheese egg honey butter bean onion potato carrot tomato sausage cabbage pepper garlic jam biscuit"
    ),
    "garment": _words("coat hat shirt shoe dress glove belt skirt jacket boot sock cloak apron robe vest shawl"),
}
KIND_TRAITS: dict[str, tuple[str, ...]] = {
    "animal": _words("fur paws tail whiskers hooves teeth claws"),
    "bird": _words("wings feathers beak eggs plumage talons"),
    "plant": _words("roots stem bark branches thorns pollen twigs"),
    "tool": _words("handle blade metal grip hinge spike"),
    "food": _words("flavor crumbs calories crust vitamins sugar"),
    "garment": _words("sleeves pockets seams lining collar stitches"),
}

JOBS: dict[str, tuple[str, ...]] = {
    "farmer": _words("wheat corn tractor plow cattle crops hoe"),
    "doctor": _words("patients medicine fever clinic wounds pills bandages nurse"),
    "teacher": _words("pupils lessons homework chalk classroom exams blackboard"),
    "sailor": _words("ship anchor sails compass waves deck mast ropes"),
    "soldier": _words("army sword battle cannon shield enemies barracks rifle"),
    "carpenter": _words("planks nails timber chairs cupboard boards sawdust varnish"),
    "tailor": _words("cloth thread suits buttonholes silk fabric trousers hem"),
    "miner": _words("coal tunnel ore pickaxe lantern shaft cave dynamite"),
}
WORKPLACES = dict(zip(JOBS, _words("barn hospital school harbor fort workshop boutique mine"), strict=True))
FEELINGS: dict[str, tuple[str, ...]] = {
    "happy": _words("joy smiled cheered danced laughed delighted glad"),
    "sad": _words("sorrow wept sighed mourned sobbed gloomy unhappy"),
    "angry": _words("rage shouted stamped cursed scolded furious cross"),
    "afraid": _words("fear trembled fled screamed shivered terrified scared"),
}

ROOMS = _words(
    "kitchen garden cellar attic library bathroom bedroom hallway office stable garage chapel tower yard barn "
    "basement workshop porch"
)
THINGS = _words(
    "lamp key box letter basket ring map clock bottle mirror candle bag coin rope blanket bowl brush chair comb "
    "cup doll flag kite pen pillow plate purse spoon stamp umbrella vase wallet bucket bracelet necklace flute"
)
COUNTED = _words(
    "apples coins books eggs cups stamps marbles shells buttons pears plums tickets beads candles nuts cards"
)
COLORS = _words("red blue green white black yellow brown gray pink purple orange")
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
SMALL_AMOUNTS = _words("no one two three few")
LARGE_AMOUNTS = _words("many ten eleven twelve countless nine")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
