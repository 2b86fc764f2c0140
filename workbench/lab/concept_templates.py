"""The sentence templates of the `concepts` corpus, in English and French, grouped into families.

A template is text with slots:

    {animal}            a word of the concept, bare; a second, different one is {animal2}; {topic} is a word of the concept at hand
    {animal.the}        a form: the, a, generic, plural (English); le, un, du, de, au, in, from, plural (French: contracted, elided)
    {animal.fr_le}      a form in the other language
    {country.capital}   the fact that goes with the word, in the template's language; {topic.kind} what it is: "an animal"
    {colour@clothing}   a French colour that agrees with the word of the other slot
    {clothing?neuf/neuve}   one of two French endings, by the gender of the word
    {decoy} {person} {town} {time} {number}     a look-alike; fillers without a meaning for the concepts

Square brackets stand around what follows from the concept or from the word: the answer. A template marked `!` is held out: no training
sentence has it. The first line of a group names family and concept ("any": whichever concept is at hand). All of it was written for this
project.
"""

from dataclasses import dataclass

_GROUPS = {
    "en": """
        paying currency
            {person} paid {number} {currency.plural} for the ticket.
            She changed {number} {currency.plural} at the bank in {town}.
            The price went up to {number} {currency.plural} {time}.
            He owes his brother {number} {currency.plural}.
            The {currency} lost value against the {currency2} {time}.
            ! A single {currency} lay at the bottom of the purse.
        money-abroad country
            In {country} they paid in [{country.currency_plural}].
            The shops of {country} give the price in [{country.currency_plural}].
            ! You need [{country.currency_plural}] if you go to {country}.
        capital country
            The capital of {country} is [{country.capital}].
            {person} went to {country} and stayed in [{country.capital}].
            ! [{country.capital}] is the capital of {country}.
        language country
            In {country} most people speak [{country.language}].
            {person} learned [{country.language}] before the trip to {country}.
        travel country
            They crossed the border of {country} {time}.
            {person} was born in {country} and moved to {town}.
            The train from {country} was late {time}.
            ! The government of {country} met {time}.
        habitat animal
            The {animal} lives [{animal.home}].
            {time}, we saw {animal.a} [{animal.home}].
            You will find {animal.plural} [{animal.home}].
            ! If you look for {animal.a}, look [{animal.home}].
        feeding animal
            {person} fed the {animal} and the {animal2}.
            The {animal} ran after {number} {animal2.plural}.
            A {colour} {animal} slept under the tree.
            ! The young {animal} was hungry and tired.
        workplace profession
            The {profession} works [{profession.workplace}].
            {person} became {profession.a} and found a job [{profession.workplace}].
            ! You can meet the {profession} [{profession.workplace}].
        working profession
            The {profession} asked the {profession2} for advice.
            {person} has worked as {profession.a} for {number} years.
            The {profession} earned {number} {currency.plural} {time}.
            ! My neighbour wants to become {profession.a}.
        likeness colour
            It was as {colour} as [{colour.like}].
            The wall is {colour}, like [{colour.like}].
            ! Everything turned {colour}, the colour of [{colour.like}].
        painting colour
            {person} painted the door {colour} {time}.
            The flag is {colour} and {colour2}.
            He mixed {colour} with {colour2} on the palette.
            ! The old house has {colour} windows.
        taste food
            The {food} tasted [{food.taste}].
            {person} says that {food} is [{food.taste}].
            ! With {food} the dish becomes [{food.taste}].
        table food
            {person} bought {food} and {food2} at the market.
            There is no {food} left on the table.
            The {profession} served {food} with {food2}.
            ! We ran out of {food} {time}.
        use body
            We use the {body} to [{body.use}].
            Without {body.a} nobody could [{body.use}].
            ! You [{body.use}] with your {body}.
        pain body
            {person} has a pain in the {body}.
            They bandaged the {body} and then the {body2}.
            He hurt his {body} {time}.
            ! The {body} was swollen after the fall.
        season weather
            The {weather} usually comes in [{weather.season}].
            {person} likes the {weather} of [{weather.season}].
            ! It was [{weather.season}], and the {weather} surprised nobody.
        forecast weather
            The radio warned {town} of the {weather}.
            After the {weather} came the {weather2}.
            The road was closed because of the {weather} {time}.
            ! The fishermen feared the {weather} more than anything.
        material clothing
            The {clothing} is made of [{clothing.material}].
            {person} sewed {clothing.a} out of [{clothing.material}].
            ! It is a fine {clothing} of good [{clothing.material}].
        wearing clothing
            {person} wore {colour.a} {clothing} {time}.
            The {clothing} cost {number} {currency.plural}.
            She put the {clothing} next to the {clothing2}.
            ! He tore his {clothing} on the fence.
        section instrument
            The {instrument} belongs to the [{instrument.section}].
            In the orchestra the {instrument} sits with the [{instrument.section}].
            ! Among the [{instrument.section}] you will hear the {instrument}.
        music instrument
            {person} plays the {instrument} in {town}.
            The {instrument} and the {instrument2} began together.
            She practised the {instrument} for {number} hours.
            ! He sold his old {instrument} {time}.
        naming any
            {topic.generic} is [{topic.kind}].
            People say that {topic.generic} is [{topic.kind}].
            Like {topic2.generic}, {topic.generic} is [{topic.kind}].
            ! What is {topic.generic}? It is [{topic.kind}].
        translation any
            The French word for {topic} is « [{topic.fr}] ».
            In French, {topic.generic} is called « [{topic.fr_le}] ».
            {person} learned that « {topic.fr} » means [{topic}].
            ! The French say « {topic.fr} » and the English say « [{topic}] ».
        decoy any
            The word {decoy} came up twice in the report.
            {person} wrote a page about the {decoy}.
            Nobody understood the {decoy} {time}.
            They spoke of the {decoy} all day.
            ! There was something odd about the {decoy}.
    """,
    "fr": """
        paying currency
            {person} a payé {number} {currency.plural} pour le billet.
            Elle a changé {number} {currency.plural} à la banque de {town}.
            Le prix est monté à {number} {currency.plural} {time}.
            Il doit {number} {currency.plural} à son frère.
            {currency.le} a perdu de la valeur face {currency2.au} {time}.
            ! Il ne restait qu'{currency.un} au fond de la bourse.
        money-abroad country
            {country.in} on a payé en [{country.currency_plural}].
            Les magasins {country.from} donnent les prix en [{country.currency_plural}].
            ! Il faut des [{country.currency_plural}] pour voyager {country.in}.
        capital country
            La capitale {country.du} est [{country.capital}].
            {person} est en voyage {country.in} et dort à [{country.capital}].
            ! [{country.capital}] est la capitale {country.du}.
        language country
            {country.in}, on parle surtout [{country.language}].
            {person} a appris à parler [{country.language}] avant de partir {country.in}.
        travel country
            Ils ont passé la frontière {country.du} {time}.
            {person} a grandi {country.in} et habite à {town}.
            Le train {country.from} avait du retard {time}.
            ! Le gouvernement {country.du} a voté {time}.
        habitat animal
            {animal.le} vit [{animal.home}].
            {time}, nous avons vu {animal.un} [{animal.home}].
            On trouve les {animal.plural} [{animal.home}].
            ! Pour voir {animal.un}, il faut chercher [{animal.home}].
        feeding animal
            {person} a nourri {animal.le} et {animal2.le}.
            {animal.le} a couru après {number} {animal2.plural}.
            {animal.un} {colour@animal} dormait sous un arbre.
            ! {animal.le} avait faim et restait {animal?seul/seule}.
        workplace profession
            {profession.le} travaille [{profession.workplace}].
            {person} veut devenir {profession} et travailler [{profession.workplace}].
            ! On rencontre {profession.le} [{profession.workplace}].
        working profession
            {profession.le} a demandé conseil {profession2.au}.
            {person} travaille comme {profession} depuis {number} ans.
            {profession.le} a gagné {number} {currency.plural} {time}.
            ! Mon voisin a parlé {profession.du} {time}.
        likeness colour
            C'était {colour} comme [{colour.like}].
            Le mur est {colour}, comme [{colour.like}].
            ! Il voyait {colour.du} partout, comme si c'était [{colour.like}].
        painting colour
            {person} a peint la porte en {colour} {time}.
            Le drapeau est {colour} et {colour2}.
            Il a mélangé {colour.du} et {colour2.du} sur la palette.
            ! La vieille maison a un toit {colour}.
        taste food
            {food.le} est très [{food.taste}].
            {person} trouve {food.le} trop [{food.taste}].
            ! On dit que {food.le} doit être [{food.taste}].
        table food
            {person} a acheté {food.du} et {food2.du} au marché.
            Il n'y a plus {food.de} sur la table.
            {profession.le} a servi {food.du} avec {food2.du}.
            ! Nous avons manqué {food.de} {time}.
        use body
            {body.le} sert à [{body.use}].
            Sans {body.le}, personne ne pourrait [{body.use}].
            ! Pour bien [{body.use}], il faut {body.un} en bonne santé.
        pain body
            {person} a mal {body.au}.
            On a soigné {body.le} puis {body2.le}.
            Il s'est blessé {body.au} {time}.
            ! {body.le} était {body?gonflé/gonflée} après la chute.
        season weather
            {weather.le} arrive surtout [{weather.season}].
            {person} aime {weather.le} [{weather.season}].
            ! On était [{weather.season}] et {weather.le} n'étonnait personne.
        forecast weather
            La radio annonce {weather.le} à {town}.
            Après {weather.le} est venu le tour {weather2.du}.
            La route était fermée à cause {weather.du} {time}.
            ! Les pêcheurs craignaient {weather.le} plus que tout.
        material clothing
            {clothing.le} est en [{clothing.material}].
            {person} a cousu {clothing.un} en [{clothing.material}].
            ! C'est {clothing.un} de qualité, en [{clothing.material}].
        wearing clothing
            {person} portait {clothing.un} {colour@clothing} {time}.
            {clothing.le} {clothing?neuf/neuve} coûte {number} {currency.plural}.
            Elle a posé {clothing.le} à côté {clothing2.du}.
            ! {clothing.le} était {clothing?déchiré/déchirée} et {clothing?vieux/vieille}.
        section instrument
            {instrument.le} fait partie des [{instrument.section}].
            Dans l'orchestre, {instrument.le} joue avec les [{instrument.section}].
            ! Parmi les [{instrument.section}], on entend {instrument.le}.
        music instrument
            {person} joue {instrument.du} à {town}.
            {instrument.le} et {instrument2.le} ont commencé ensemble.
            Elle a travaillé {instrument.le} pendant {number} heures.
            ! Il a vendu {instrument.un} {instrument?ancien/ancienne} {time}.
        naming any
            {topic.le} est [{topic.kind}].
            On dit que {topic.le} est [{topic.kind}].
            Comme {topic2.le}, {topic.le} est [{topic.kind}].
            ! Que veut dire « {topic} » ? C'est [{topic.kind}].
        translation any
            Le mot anglais pour {topic} est « [{topic.en}] ».
            En anglais, {topic.le} se dit « [{topic.en_generic}] ».
            {person} a appris que « {topic.en} » veut dire [{topic}].
            ! Les Anglais disent « {topic.en} » et les Français disent « [{topic}] ».
        decoy any
            Le mot « {decoy} » revient deux fois dans le rapport.
            {person} a écrit une page sur {decoy.le}.
            Personne ne comprend {decoy.le}.
            On a parlé {decoy.du} toute la journée.
            ! Il y avait quelque chose d'étrange dans {decoy.le}.
    """,
}

FILLERS = {
    "en": {
        "person": ("Anna", "Tom", "Mary", "Paul", "Alice", "George", "Helen", "Peter", "Ruth", "David", "Emma", "Simon"),
        "town": ("Leeds", "Bristol", "York", "Dover", "Oxford", "Boston", "Chester", "Durham"),
        "time": ("yesterday", "last week", "in March", "on Monday", "this morning", "two years ago", "at night", "in June"),
        "number": ("five", "ten", "twelve", "20", "35", "100", "250", "three", "eight", "60"),
    },
    "fr": {
        "person": ("Claire", "Jean", "Sophie", "Luc", "Camille", "Pierre", "Marc", "Julie", "Denis", "Lucie", "Bruno", "Nadia"),
        "town": ("Lyon", "Nantes", "Lille", "Dijon", "Tours", "Metz", "Rouen", "Brest"),
        "time": ("hier", "la semaine dernière", "en mars", "lundi", "ce matin", "il y a deux ans", "cette nuit", "en juin"),
        "number": ("cinq", "dix", "douze", "20", "35", "100", "250", "trois", "huit", "60"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One template. `concept` is what its sentences are about, None if that is whichever concept is at hand."""

    name: str  # "en/paying/0"
    language: str
    family: str
    concept: str | None
    text: str
    held_out: bool


def _templates(language: str, groups: str) -> list[Template]:
    templates: list[Template] = []
    family, concept, number = "", None, 0
    for line in groups.strip("\n").splitlines():
        if line[8:9] != " " and line.strip():
            family, about = line.split()
            concept, number = (None if about == "any" else about), 0
        elif line.strip():
            held_out, text = line.strip().startswith("! "), line.strip().removeprefix("! ")
            templates.append(Template(f"{language}/{family}/{number}", language, family, concept, text, held_out))
            number += 1
    return templates


TEMPLATES = tuple(template for language, groups in _GROUPS.items() for template in _templates(language, groups))
"""All templates, English first, in the order above."""
