"""Twenty kinds of things, and words for them."""

KINDS = {
    "bird": "sparrow eagle owl parrot swan pigeon crow stork heron falcon robin penguin duck goose finch "
    "raven hawk gull turkey peacock woodpecker flamingo",
    "fish": "salmon trout tuna shark herring cod carp pike eel sardine mackerel halibut perch anchovy bass "
    "catfish haddock sturgeon piranha swordfish sole flounder",
    "insect": "ant bee wasp beetle moth butterfly mosquito cricket grasshopper fly flea termite dragonfly "
    "ladybug locust hornet cockroach gnat aphid mantis cicada bumblebee",
    "mammal": "horse cow lion tiger elephant giraffe rabbit squirrel wolf fox bear whale dolphin bat otter "
    "beaver kangaroo camel hedgehog badger zebra leopard",
    "fruit": "apple banana cherry grape lemon peach plum mango kiwi fig melon apricot pineapple papaya "
    "strawberry raspberry blueberry pear coconut lime orange pomegranate",
    "vegetable": "carrot onion cabbage spinach leek turnip broccoli cauliflower lettuce celery asparagus "
    "radish cucumber zucchini eggplant pumpkin parsnip kale artichoke beet garlic potato",
    "tree": "oak pine birch maple willow cedar elm spruce poplar beech fir cypress redwood sequoia larch "
    "hemlock magnolia sycamore aspen alder linden baobab",
    "flower": "rose tulip daisy lily orchid violet daffodil sunflower iris poppy carnation lavender jasmine "
    "peony hyacinth marigold petunia dahlia lilac begonia geranium crocus",
    "tool": "hammer saw drill wrench screwdriver pliers chisel axe shovel rake file crowbar sander trowel "
    "mallet clamp spade hoe sickle pickaxe anvil spanner",
    "instrument": "piano violin guitar flute trumpet drum cello harp clarinet saxophone trombone banjo oboe "
    "tuba accordion harmonica xylophone bassoon mandolin ukulele bagpipe lute",
    "vehicle": "car bus truck train bicycle tram van taxi scooter motorcycle tractor ambulance helicopter "
    "airplane wagon limousine jeep trolley carriage sled bulldozer minivan",
    "clothing": "shirt jacket trousers skirt dress coat sweater sock glove scarf hat boot sandal blouse vest "
    "jeans suit shorts pajamas apron cardigan hoodie",
    "furniture": "chair table sofa bed desk wardrobe shelf stool bench cabinet dresser armchair couch "
    "bookcase cupboard nightstand sideboard recliner crib ottoman futon hammock",
    "profession": "doctor teacher lawyer baker farmer plumber nurse carpenter engineer pilot barber butcher "
    "dentist electrician mechanic tailor waiter accountant architect chef journalist librarian",
    "country": "France Japan Brazil Canada Egypt India Kenya Mexico Norway Peru Spain Turkey Vietnam Chile "
    "Greece Italy Poland Sweden Thailand Ghana Iran Cuba",
    "city": "London Paris Tokyo Berlin Madrid Rome Moscow Chicago Boston Cairo Sydney Toronto Vienna Prague "
    "Dublin Mumbai Seoul Lisbon Athens Warsaw Oslo Milan",
    "metal": "iron copper gold silver tin zinc lead aluminum nickel titanium platinum mercury cobalt tungsten "
    "chromium magnesium lithium uranium bronze steel brass palladium",
    "sport": "football tennis golf hockey boxing rugby cricket swimming basketball baseball volleyball "
    "badminton rowing fencing wrestling skiing surfing judo archery cycling gymnastics karate",
    "color": "red blue green yellow purple black white brown pink gray turquoise crimson beige maroon scarlet "
    "indigo magenta cyan teal ivory khaki amber",
    "emotion": "anger joy fear sadness envy pride shame grief love hate disgust surprise guilt jealousy "
    "anxiety delight hope despair rage contempt regret boredom",
}
"""The words of each label."""
