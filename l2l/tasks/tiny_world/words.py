"""Real English words of the tiny world, grouped by meaning. The order in a group is its frequency rank."""

from __future__ import annotations


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "sport": {
        "who": word_list(
            "player team coach runner captain striker goalkeeper swimmer boxer athlete champion referee rookie "
            "defender cyclist skater sprinter wrestler"
        ),
        "did": word_list(
            "won kicked lost scored caught threw passed defended chased trained tackled blocked raced dribbled"
        ),
        "what": word_list(
            "match ball goal race game medal trophy league cup penalty record whistle title final helmet racket "
            "tournament marathon"
        ),
        "where": word_list("stadium field court arena track pool gym pitch rink ring"),
        "how": word_list("athletic fast fit sweaty unbeaten muscular sporty"),
    },
    "cooking": {
        "who": word_list("chef cook waiter baker butcher caterer taster brewer grocer confectioner dishwasher"),
        "did": word_list(
            "baked served boiled cooked roasted fried stirred tasted chopped grilled peeled sliced simmered seasoned"
        ),
        "what": word_list(
            "soup bread stew cake pie sauce dough salad roast broth pudding noodles omelet pancake curry gravy "
            "recipe dessert"
        ),
        "where": word_list("kitchen restaurant bakery tavern diner pantry cafe oven buffet"),
        "how": word_list("spicy salty crispy juicy buttery creamy savory"),
    },
    "music": {
        "who": word_list(
            "singer drummer pianist choir band violinist composer guitarist conductor orchestra flutist soprano "
            "cellist songwriter organist"
        ),
        "did": word_list("sang played composed rehearsed performed recorded tuned hummed strummed whistled conducted"),
        "what": word_list(
            "song tune melody concert drum violin album symphony piano ballad chorus flute opera guitar anthem "
            "lullaby rhythm harp"
        ),
        "where": word_list("hall stage studio theater ballroom auditorium balcony"),
        "how": word_list("melodic rhythmic acoustic musical tuneful harmonic"),
    },
    "science": {
        "who": word_list(
            "scientist professor researcher astronomer chemist physicist engineer inventor biologist geologist "
            "botanist mathematician"
        ),
        "did": word_list(
            "studied discovered tested measured proved observed published calculated analyzed invented explained"
        ),
        "what": word_list(
            "planet theory experiment atom comet cell formula gene crystal molecule particle telescope fossil "
            "microscope virus equation galaxy magnet"
        ),
        "where": word_list("laboratory university observatory museum institute library academy greenhouse"),
        "how": word_list("scientific magnetic chemical microscopic electric genetic"),
    },
    "trade": {
        "who": word_list(
            "merchant banker trader buyer seller broker manager investor clerk accountant landlord auctioneer "
            "shopkeeper"
        ),
        "did": word_list("sold bought paid borrowed traded invested priced lent exported auctioned imported"),
        "what": word_list(
            "goods loan shares contract price tax profit debt coins stock budget rent invoice cargo wages bond "
            "discount gold"
        ),
        "where": word_list("market bank shop office exchange warehouse bazaar mall"),
        "how": word_list("costly profitable cheap wealthy financial commercial"),
    },
    "crime": {
        "who": word_list(
            "police thief detective judge robber lawyer guard sheriff smuggler burglar prisoner witness spy"
        ),
        "did": word_list("stole arrested robbed accused hid searched jailed kidnapped forged questioned betrayed"),
        "what": word_list(
            "jewels evidence crime suspect alibi trial verdict gun ransom handcuffs fingerprint safe vault "
            "confession clue"
        ),
        "where": word_list("prison courtroom alley station cellar hideout dungeon"),
        "how": word_list("guilty masked criminal illegal armed dishonest"),
    },
}

ADJECTIVES = word_list(
    "old young famous new small local tall quiet big foreign tired busy brave clever proud shy strange nervous "
    "patient retired lucky stubborn honest humble eager careful"
)
TIMES = word_list(
    "today yesterday again early late twice slowly quickly together alone recently suddenly finally often "
    "once carefully quietly secretly"
)

LEVELS: tuple[tuple[str, ...], ...] = (
    word_list("terrible awful horrible dreadful disgusting appalling hideous unbearable atrocious abysmal"),
    word_list("bad poor dull weak boring disappointing clumsy stale shabby tedious bland dirty"),
    word_list("average ordinary fair plain usual standard typical passable middling unremarkable"),
    word_list("good nice pleasant enjoyable fine charming solid likable neat tasteful agreeable"),
    word_list(
        "great wonderful excellent superb brilliant perfect amazing fantastic magnificent splendid outstanding stunning"
    ),
)
PRAISE = word_list("enjoyed loved admired liked praised recommended adored cherished applauded")
BLAME = word_list("disliked hated regretted criticized avoided detested loathed resented despised")

REVIEWED: dict[str, tuple[str, ...]] = {
    "film": word_list("plot actors ending script camera dialogue scenes"),
    "hotel": word_list("room bed staff lobby view towels breakfast"),
    "book": word_list("story chapters hero style pages cover author"),
    "dinner": word_list("food service table wine menu portions taste"),
    "trip": word_list("guide train bus beach tour tickets weather"),
    "phone": word_list("screen battery sound buttons case signal speaker"),
}

SEASONS: dict[str, tuple[str, ...]] = {
    "winter": word_list(
        "snow ice frost sledge blizzard icicles mittens scarf snowman skates fireplace stove slush hail"
    ),
    "spring": word_list(
        "blossom buds seedlings puddles nest lambs tulips chicks daffodils drizzle sprouts robins showers petals"
    ),
    "summer": word_list(
        "sunshine heat sunburn sandals swimming thunder picnic shade sweat lemonade drought fan mosquitoes tan"
    ),
    "autumn": word_list(
        "harvest leaves pumpkins mushrooms acorns fog rake apples geese grapes chestnuts wind scarecrow hay"
    ),
}
MONTHS: dict[str, tuple[str, ...]] = {
    "winter": word_list("december january february"),
    "spring": word_list("march april may"),
    "summer": word_list("june july august"),
    "autumn": word_list("september october november"),
}

OPPOSITES = tuple(
    (a, b)
    for a, b in zip(
        word_list(
            "hot big old fast open full wet dark heavy long high loud early rich strong hard clean happy deep thick "
            "wide near sharp rough sweet soft true alive tight bright right first major public asleep smooth safe "
            "visible ancient guilty generous simple lazy calm tame ripe brave up above inside north east day "
            "summer friend laugh arrive buy push remember win begin build love"
        ),
        word_list(
            "cold small new slow closed empty dry light weightless short low silent late poor weak easy dirty sad "
            "shallow thin narrow far blunt even bitter stiff false dead loose dim wrong last minor private awake bumpy "
            "dangerous hidden modern innocent greedy complex diligent stormy wild unripe cowardly down below outside "
            "south west night winter enemy cry depart sell pull forget lose finish destroy hate"
        ),
        strict=True,
    )
)

KINDS: dict[str, tuple[str, ...]] = {
    "animal": word_list(
        "dog cat horse cow wolf bear sheep lion mouse goat rabbit fox pig tiger deer monkey camel donkey otter "
        "badger weasel hamster beaver"
    ),
    "bird": word_list(
        "crow owl robin hen duck swan eagle goose parrot pigeon hawk sparrow raven stork heron finch gull falcon"
    ),
    "plant": word_list(
        "oak rose grass pine lily fern ivy moss birch willow maple cactus clover daisy orchid thistle elm reed"
    ),
    "tool": word_list(
        "hammer saw knife axe shovel drill wrench needle chisel pliers ladder broom file scissors tongs sickle"
    ),
    "food": word_list(
        "rice cheese egg honey butter bean onion potato carrot tomato sausage cabbage pepper garlic jam biscuit"
    ),
    "garment": word_list("coat hat shirt shoe dress glove belt skirt jacket boot sock cloak apron robe vest shawl"),
}
KIND_TRAITS: dict[str, tuple[str, ...]] = {
    "animal": word_list("fur paws tail whiskers hooves teeth claws"),
    "bird": word_list("wings feathers beak eggs plumage talons"),
    "plant": word_list("roots stem bark branches thorns pollen twigs"),
    "tool": word_list("handle blade metal grip hinge spike"),
    "food": word_list("flavor crumbs calories crust vitamins sugar"),
    "garment": word_list("sleeves pockets seams lining collar stitches"),
}

JOBS: dict[str, tuple[str, ...]] = {
    "farmer": word_list("wheat corn tractor plow cattle crops hoe"),
    "doctor": word_list("patients medicine fever clinic wounds pills bandages nurse"),
    "teacher": word_list("pupils lessons homework chalk classroom exams blackboard"),
    "sailor": word_list("ship anchor sails compass waves deck mast ropes"),
    "soldier": word_list("army sword battle cannon shield enemies barracks rifle"),
    "carpenter": word_list("planks nails timber chairs cupboard boards sawdust varnish"),
    "tailor": word_list("cloth thread suits buttonholes silk fabric trousers hem"),
    "miner": word_list("coal tunnel ore pickaxe lantern shaft cave dynamite"),
}
WORKPLACES = dict(zip(JOBS, word_list("barn hospital school harbor fort workshop boutique mine"), strict=True))
FEELINGS: dict[str, tuple[str, ...]] = {
    "happy": word_list("joy smiled cheered danced laughed delighted glad"),
    "sad": word_list("sorrow wept sighed mourned sobbed gloomy unhappy"),
    "angry": word_list("rage shouted stamped cursed scolded furious cross"),
    "afraid": word_list("fear trembled fled screamed shivered terrified scared"),
}

ROOMS = word_list(
    "kitchen garden cellar attic library bathroom bedroom hallway office stable garage chapel tower yard barn "
    "basement workshop porch"
)
THINGS = word_list(
    "lamp key box letter basket ring map clock bottle mirror candle bag coin rope blanket bowl brush chair comb "
    "cup doll flag kite pen pillow plate purse spoon stamp umbrella vase wallet bucket bracelet necklace flute"
)
COUNTED = word_list(
    "apples coins books eggs cups stamps marbles shells buttons pears plums tickets beads candles nuts cards"
)
COLORS = word_list("red blue green white black yellow brown gray pink purple orange")
NUMBERS = word_list("one two three four five six seven eight nine ten eleven twelve")
SMALL_AMOUNTS = word_list("no one two three few")
LARGE_AMOUNTS = word_list("many ten eleven twelve countless nine")
DAYS = word_list("monday tuesday wednesday thursday friday saturday sunday")
