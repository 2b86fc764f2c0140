"""The vocabulary of the `concepts` corpus: ten concepts in English and French, the fact that goes with every word, and decoys.

One table per concept. `en`, `fr`: the word in each language; `gender` m or f of the French word; further columns are plurals and facts,
one per language where they differ. "a/b" in a French cell is the masculine and the feminine form. A word marked `*` is held out: it
occurs in no training sentence, in neither language. All of it was written for this project.
"""

from dataclasses import dataclass

LANGUAGES = ("en", "fr")

_TABLES = {
    "currency": """
        en      | en_plural | fr       | fr_plural | gender
        euro    | euros     | euro     | euros     | m
        dollar  | dollars   | dollar   | dollars   | m
        pound   | pounds    | livre    | livres    | f
        yen     | yen       | yen      | yens      | m
        franc   | francs    | franc    | francs    | m
        ruble   | rubles    | rouble   | roubles   | m
        rupee   | rupees    | roupie   | roupies   | f
        peso    | pesos     | peso     | pesos     | m
        dinar   | dinars    | dinar    | dinars    | m
        crown   | crowns    | couronne | couronnes | f
        zloty   | zlotys    | zloty    | zlotys    | m
        forint  | forints   | forint   | forints   | m
        shekel  | shekels   | shekel   | shekels   | m
        yuan    | yuan      | yuan     | yuans     | m
        baht    | baht      | baht     | bahts     | m
        *dirham | dirhams   | dirham   | dirhams   | m
        *guilder | guilders | florin   | florins   | m
        *peseta | pesetas   | peseta   | pesetas   | f
    """,
    "country": """
        en          | fr          | gender | en_capital  | fr_capital | currency | en_language | fr_language
        France      | France      | f      | Paris       | Paris      | euro     | French      | français
        Germany     | Allemagne   | f      | Berlin      | Berlin     | euro     | German      | allemand
        Spain       | Espagne     | f      | Madrid      | Madrid     | euro     | Spanish     | espagnol
        Italy       | Italie      | f      | Rome        | Rome       | euro     | Italian     | italien
        England     | Angleterre  | f      | London      | Londres    | pound    | English     | anglais
        Japan       | Japon       | m      | Tokyo       | Tokyo      | yen      | Japanese    | japonais
        China       | Chine       | f      | Beijing     | Pékin      | yuan     | Chinese     | chinois
        Russia      | Russie      | f      | Moscow      | Moscou     | ruble    | Russian     | russe
        India       | Inde        | f      | New Delhi   | New Delhi  | rupee    | Hindi       | hindi
        Argentina   | Argentine   | f      | Buenos Aires | Buenos Aires | peso | Spanish     | espagnol
        Canada      | Canada      | m      | Ottawa      | Ottawa     | dollar   | English     | anglais
        Poland      | Pologne     | f      | Warsaw      | Varsovie   | zloty    | Polish      | polonais
        Hungary     | Hongrie     | f      | Budapest    | Budapest   | forint   | Hungarian   | hongrois
        Sweden      | Suède       | f      | Stockholm   | Stockholm  | crown    | Swedish     | suédois
        Norway      | Norvège     | f      | Oslo        | Oslo       | crown    | Norwegian   | norvégien
        Switzerland | Suisse      | f      | Bern        | Berne      | franc    | German      | allemand
        Tunisia     | Tunisie     | f      | Tunis       | Tunis      | dinar    | Arabic      | arabe
        Thailand    | Thaïlande   | f      | Bangkok     | Bangkok    | baht     | Thai        | thaï
        *Morocco    | Maroc       | m      | Rabat       | Rabat      | dirham   | Arabic      | arabe
        *Portugal   | Portugal    | m      | Lisbon      | Lisbonne   | euro     | Portuguese  | portugais
        *Ireland    | Irlande     | f      | Dublin      | Dublin     | euro     | English     | anglais
    """,
    "animal": """
        en        | en_plural | fr         | fr_plural   | gender | en_home        | fr_home
        cat       | cats      | chat       | chats       | m      | in the house   | dans la maison
        dog       | dogs      | chien      | chiens      | m      | in the kennel  | dans la niche
        horse     | horses    | cheval     | chevaux     | m      | in the stable  | dans l'écurie
        cow       | cows      | vache      | vaches      | f      | in the meadow  | dans le pré
        pig       | pigs      | cochon     | cochons     | m      | in the sty     | dans la porcherie
        sheep     | sheep     | mouton     | moutons     | m      | in the meadow  | dans le pré
        goat      | goats     | chèvre     | chèvres     | f      | on the hill    | sur la colline
        wolf      | wolves    | loup       | loups       | m      | in the forest  | dans la forêt
        bear      | bears     | ours       | ours        | m      | in the forest  | dans la forêt
        fox       | foxes     | renard     | renards     | m      | in the forest  | dans la forêt
        lion      | lions     | lion       | lions       | m      | in the savanna | dans la savane
        elephant  | elephants | éléphant   | éléphants   | m      | in the savanna | dans la savane
        camel     | camels    | chameau    | chameaux    | m      | in the desert  | dans le désert
        whale     | whales    | baleine    | baleines    | f      | in the sea     | dans la mer
        shark     | sharks    | requin     | requins     | m      | in the sea     | dans la mer
        frog      | frogs     | grenouille | grenouilles | f      | in the pond    | dans l'étang
        rabbit    | rabbits   | lapin      | lapins      | m      | in the burrow  | dans le terrier
        bee       | bees      | abeille    | abeilles    | f      | in the hive    | dans la ruche
        *giraffe  | giraffes  | girafe     | girafes     | f      | in the savanna | dans la savane
        *otter    | otters    | loutre     | loutres     | f      | in the pond    | dans l'étang
        *squirrel | squirrels | écureuil   | écureuils   | m      | in the forest  | dans la forêt
    """,
    "profession": """
        en          | fr             | gender | en_workplace  | fr_workplace
        baker       | boulanger      | m      | in a bakery   | dans une boulangerie
        doctor      | médecin        | m      | in a hospital | dans un hôpital
        nurse       | infirmière     | f      | in a hospital | dans un hôpital
        teacher     | professeur     | m      | in a school   | dans une école
        farmer      | agriculteur    | m      | on a farm     | dans une ferme
        judge       | juge           | m      | in a court    | dans un tribunal
        lawyer      | avocat         | m      | in a court    | dans un tribunal
        sailor      | marin          | m      | on a ship     | sur un navire
        pilot       | pilote         | m      | in a plane    | dans un avion
        butcher     | boucher        | m      | in a shop     | dans un magasin
        cook        | cuisinier      | m      | in a kitchen  | dans une cuisine
        waiter      | serveur        | m      | in a café     | dans un bar
        actor       | acteur         | m      | in a theatre  | dans un théâtre
        painter     | peintre        | m      | in a studio   | dans un atelier
        carpenter   | menuisier      | m      | in a workshop | dans un atelier
        librarian   | bibliothécaire | m      | in a library  | dans une bibliothèque
        soldier     | soldat         | m      | in a barracks | dans une caserne
        *pharmacist | pharmacien     | m      | in a shop     | dans un magasin
        *surgeon    | chirurgien     | m      | in a hospital | dans un hôpital
        *dancer     | danseuse       | f      | in a theatre  | dans un théâtre
    """,
    "colour": """
        en        | fr                | gender | en_like   | fr_like
        red       | rouge             | m      | blood     | le sang
        blue      | bleu/bleue        | m      | the sky   | le ciel
        green     | vert/verte        | m      | grass     | l'herbe
        yellow    | jaune             | m      | lemons    | un citron
        black     | noir/noire        | m      | coal      | le charbon
        white     | blanc/blanche     | m      | chalk     | la craie
        grey      | gris/grise        | m      | ash       | la cendre
        brown     | brun/brune        | m      | earth     | la terre
        pink      | rose              | m      | candy     | un bonbon
        purple    | violet/violette   | m      | lavender  | la lavande
        orange    | orange            | m      | embers    | la braise
        golden    | doré/dorée        | m      | wheat     | le blé
        silver    | argenté/argentée  | m      | the moon  | la lune
        beige     | beige             | m      | sand      | le sable
        turquoise | turquoise         | m      | a lagoon  | un lagon
        *crimson  | cramoisi/cramoisie | m     | blood     | le sang
        *indigo   | indigo            | m      | lavender  | la lavande
        *khaki    | kaki              | m      | grass     | l'herbe
    """,
    "food": """
        en       | fr        | gender | en_taste | fr_taste
        bread    | pain      | m      | mild     | doux/douce
        cheese   | fromage   | m      | salty    | salé/salée
        butter   | beurre    | m      | mild     | doux/douce
        rice     | riz       | m      | mild     | doux/douce
        soup     | soupe     | f      | salty    | salé/salée
        ham      | jambon    | m      | salty    | salé/salée
        sugar    | sucre     | m      | sweet    | sucré/sucrée
        honey    | miel      | m      | sweet    | sucré/sucrée
        jam      | confiture | f      | sweet    | sucré/sucrée
        cake     | gâteau    | m      | sweet    | sucré/sucrée
        vinegar  | vinaigre  | m      | sour     | acide
        yoghurt  | yaourt    | m      | sour     | acide
        mustard  | moutarde  | f      | hot      | piquant/piquante
        pepper   | poivre    | m      | hot      | piquant/piquante
        garlic   | ail       | m      | hot      | piquant/piquante
        coffee   | café      | m      | bitter   | amer/amère
        tea      | thé       | m      | bitter   | amer/amère
        milk     | lait      | m      | mild     | doux/douce
        *syrup   | sirop     | m      | sweet    | sucré/sucrée
        *ginger  | gingembre | m      | hot      | piquant/piquante
        *cider   | cidre     | m      | sour     | acide
    """,
    "body": """
        en       | fr       | gender | en_use  | fr_use
        eye      | œil      | m      | see     | voir
        ear      | oreille  | f      | listen  | écouter
        hand     | main     | f      | hold    | tenir
        foot     | pied     | m      | walk    | marcher
        nose     | nez      | m      | smell   | sentir
        mouth    | bouche   | f      | speak   | parler
        tooth    | dent     | f      | bite    | mordre
        tongue   | langue   | f      | taste   | goûter
        leg      | jambe    | f      | run     | courir
        finger   | doigt    | m      | point   | montrer
        knee     | genou    | m      | kneel   | plier
        shoulder | épaule   | f      | carry   | porter
        arm      | bras     | m      | lift    | lever
        heart    | cœur     | m      | love    | aimer
        stomach  | estomac  | m      | digest  | digérer
        lung     | poumon   | m      | breathe | respirer
        brain    | cerveau  | m      | think   | penser
        *elbow   | coude    | m      | carry   | porter
        *wrist   | poignet  | m      | hold    | tenir
        *ankle   | cheville | f      | walk    | marcher
    """,
    "weather": """
        en        | fr         | gender | en_season | fr_season
        rain      | pluie      | f      | autumn    | en automne
        snow      | neige      | f      | winter    | en hiver
        wind      | vent       | m      | autumn    | en automne
        fog       | brouillard | m      | autumn    | en automne
        storm     | tempête    | f      | autumn    | en automne
        hail      | grêle      | f      | spring    | au printemps
        frost     | gel        | m      | winter    | en hiver
        sunshine  | soleil     | m      | summer    | en été
        thunder   | tonnerre   | m      | summer    | en été
        lightning | foudre     | f      | summer    | en été
        drizzle   | bruine     | f      | spring    | au printemps
        heat      | chaleur    | f      | summer    | en été
        ice       | verglas    | m      | winter    | en hiver
        mist      | brume      | f      | autumn    | en automne
        breeze    | brise      | f      | spring    | au printemps
        shower    | averse     | f      | spring    | au printemps
        blizzard  | blizzard   | m      | winter    | en hiver
        *sleet    | grésil     | m      | winter    | en hiver
        *hurricane | ouragan   | m      | autumn    | en automne
        *downpour | déluge     | m      | summer    | en été
    """,
    "clothing": """
        en         | fr          | gender | en_material | fr_material
        hat        | chapeau     | m      | felt        | feutre
        coat       | manteau     | m      | wool        | laine
        shirt      | chemise     | f      | cotton      | coton
        dress      | robe        | f      | silk        | soie
        skirt      | jupe        | f      | linen       | lin
        jacket     | veste       | f      | leather     | cuir
        scarf      | écharpe     | f      | wool        | laine
        belt       | ceinture    | f      | leather     | cuir
        tie        | cravate     | f      | silk        | soie
        sweater    | pull        | m      | wool        | laine
        cap        | casquette   | f      | cotton      | coton
        cloak      | cape        | f      | velvet      | velours
        waistcoat  | gilet       | m      | linen       | lin
        raincoat   | imperméable | m      | rubber      | caoutchouc
        suit       | costume     | m      | linen       | lin
        apron      | tablier     | m      | cotton      | coton
        glove      | gant        | m      | leather     | cuir
        boot       | botte       | f      | rubber      | caoutchouc
        *tunic     | tunique     | f      | linen       | lin
        *kimono    | kimono      | m      | silk        | soie
        *overcoat  | pardessus   | m      | wool        | laine
    """,
    "instrument": """
        en         | fr          | gender | en_section | fr_section
        piano      | piano       | m      | keyboards  | claviers
        organ      | orgue       | m      | keyboards  | claviers
        accordion  | accordéon   | m      | keyboards  | claviers
        guitar     | guitare     | f      | strings    | cordes
        violin     | violon      | m      | strings    | cordes
        cello      | violoncelle | m      | strings    | cordes
        harp       | harpe       | f      | strings    | cordes
        mandolin   | mandoline   | f      | strings    | cordes
        flute      | flûte       | f      | woodwinds  | bois
        clarinet   | clarinette  | f      | woodwinds  | bois
        oboe       | hautbois    | m      | woodwinds  | bois
        bassoon    | basson      | m      | woodwinds  | bois
        saxophone  | saxophone   | m      | woodwinds  | bois
        trumpet    | trompette   | f      | brass      | cuivres
        trombone   | trombone    | m      | brass      | cuivres
        tuba       | tuba        | m      | brass      | cuivres
        drum       | tambour     | m      | percussion | percussions
        cymbal     | cymbale     | f      | percussion | percussions
        *lute      | luth        | m      | strings    | cordes
        *bugle     | clairon     | m      | brass      | cuivres
        *spinet    | épinette    | f      | keyboards  | claviers
    """,
}

KINDS = {
    "currency": ("a currency", "une monnaie"),
    "country": ("a country", "un pays"),
    "animal": ("an animal", "un animal"),
    "profession": ("a profession", "un métier"),
    "colour": ("a colour", "une couleur"),
    "food": ("a food", "un aliment"),
    "body": ("a part of the body", "une partie du corps"),
    "weather": ("a kind of weather", "un phénomène météo"),
    "clothing": ("a garment", "un vêtement"),
    "instrument": ("an instrument", "un instrument"),
}
"""What a word of the concept is, in English and French."""

CONCEPTS = tuple(KINDS)

WITHOUT_ARTICLE = ("country", "colour", "food")
"""Concepts whose English words stand without an article when they are spoken of in general: "bread", "France"."""

_DECOYS = {
    "en": """
        currency: neuron compound frankness pounding | country: germ spanner canal indication | animal: catalogue dogma bearing pigment
        profession: nursery soldering lawn prejudice | colour: hundred greenhouse blueprint reduction | food: ricochet teapot hamlet jamb
        body: earthquake handle legend armchair | weather: train window notice showroom | clothing: chat tiebreak socket capsule
        instrument: harpoon organisation drumlin saxifrage
    """,
    "fr": """
        currency: neurone.m délivrance.f franchise.f | country: échine.f espagnolette.f indécision.f | animal: achat.m château.m course.f
        profession: jugement.m marinade.f peinture.f | colour: vertige.m rosée.f ouverture.f | food: détail.m théorie.f laiton.m
        body: brassard.m dentelle.f piédestal.m | weather: aventure.f inventaire.m aventurine.f | clothing: enrobage.m vestige.m captation.f
        instrument: décor.m harpon.m tubage.m
    """,
}


@dataclass(frozen=True, eq=False)
class ConceptWord:
    """One word of a concept in both languages. `key` is the English word; `facts` holds the other columns of its table."""

    concept: str
    key: str
    held_out: bool
    gender: str
    facts: dict[str, str]

    def form(self, language: str, plural: bool = False, gender: str = "m") -> str:
        """The bare word; a French colour agrees with `gender`."""
        return agreeing(self.facts[f"{language}_plural" if plural else language], gender)


@dataclass(frozen=True)
class Decoy:
    """A word that shares letters with a word of the concept it `imitates` and means something else."""

    language: str
    text: str
    imitates: str
    gender: str


def agreeing(cell: str, gender: str) -> str:
    """The masculine or feminine form of a cell "masculine/feminine"; a cell with one form as it is."""
    forms = cell.split("/")
    return forms[-1] if gender == "f" else forms[0]


def _words(concept: str, table: str) -> tuple[ConceptWord, ...]:
    header, *rows = ([cell.strip() for cell in line.split("|")] for line in table.strip().splitlines())
    words = []
    for row in rows:
        facts = dict(zip(header, row, strict=True))
        held_out, facts["en"] = facts["en"].startswith("*"), facts["en"].lstrip("*")
        words.append(ConceptWord(concept, facts["en"], held_out, facts.pop("gender"), facts))
    return tuple(words)


def _decoys(language: str, text: str) -> tuple[Decoy, ...]:
    decoys = []
    for group in text.replace("\n", "|").split("|"):
        concept, _, words = group.partition(":")
        for word in words.split():
            spelling, _, gender = word.partition(".")
            decoys.append(Decoy(language, spelling, concept.strip(), gender))
    return tuple(decoys)


WORDS = {concept: _words(concept, table) for concept, table in _TABLES.items()}
DECOYS = {language: _decoys(language, text) for language, text in _DECOYS.items()}
