"""The words of the embedded world, which make.py puts together: relations, names, talk."""
import collections

# A relation belongs to one of four kinds of subjects. Each has two lines: the kind of its value V |
# three ways to state it, after the subject | three ways to ask for it of the subject S. Many
# relations share a kind, so the kind of word in a text never tells which question it answers.
Relation = collections.namedtuple("Relation", "kind statements questions")
RELATIONS = {"person": """
place | was born in V; came into the world in V; first saw the light of day in V
  | where was S born; what is the birthplace of S; in which town did S come into the world
place | went to school in V; learned to read and write in V; sat in the classrooms of V
  | where did S go to school; in which town was S a pupil; where did S have lessons as a child
place | married in V; held the wedding feast in V; stood at the altar in V
  | where did S marry; in which town was the wedding of S; where did S become a bride or groom
place | fell ill in V; caught a fever in V; lay sick for weeks in V
  | where did S fall ill; in which town did the sickness strike S; where did S have a fever
place | is buried in V; lies in the churchyard of V; was carried to the grave in V
  | where is S buried; what town holds the grave of S; in which churchyard does S lie
place | was jailed in V; sat behind bars in V; was locked in a cell in V
  | where was S jailed; which town kept S in prison; in which town was S behind bars
place | opened a shop in V; set up a business in V; began to trade in V
  | where did S open a shop; in which town was the business of S; where could people buy from S
place | was robbed in V; lost a purse to thieves in V; was attacked by bandits near V
  | where was S robbed; in which town did thieves find S; where did bandits attack S
person | was the child of V; grew up in the care of the father V; called V father
  | who was the father of S; whose child was S; who raised S
person | had a rival in V; competed for years with V; fought for the same customers as V
  | who was the rival of S; with whom did S compete; who wanted the customers of S
person | was taught by V; took lessons from V; learned the craft from V
  | who was the teacher of S; who taught S the craft; who gave lessons to S
person | let a room to V; took in V as a lodger; shared the house for rent with V
  | who was the lodger of S; who paid rent to S; to whom did S let a room
person | wed V; took V as a spouse; exchanged rings with V
  | who was the spouse of S; whom did S wed; with whom did S exchange rings
person | left everything to V; named V as the heir; gave the whole fortune to V in a will
  | who was the heir of S; who got the fortune of S; who is named in the will of S
person | was healed by V; was nursed back to health by V; had V as a doctor
  | who was the doctor of S; who nursed S; who healed S
person | lent money to V; gave a loan to V; paid the debts of V
  | who owed money to S; to whom did S give a loan; whose debts did S pay
year | moved house in V; packed up and left home in V; changed towns in V
  | when did S move house; in what year did S leave home; when did S pack up
year | retired in V; gave up work in V; put the tools away for good in V
  | when did S retire; in what year did S stop work; when did S put the tools away
year | sailed abroad in V; took ship to far lands in V; crossed the sea in V
  | when did S sail abroad; in what year did S cross the sea; when did S take ship
year | won the great prize in V; took home the medal in V; came first in the contest of V
  | when did S win the prize; in what year did S get the medal; when did S come first in the contest
year | broke a leg in V; had a bad fall in V; was hurt in an accident in V
  | when did S break a leg; in what year was the accident of S; when was S hurt
year | became mayor in V; took the chain of office in V; was voted head of the town in V
  | when did S become mayor; in what year was S voted head of the town; when did S take office
thing | inherited a V; got a V from an aunt; came by a V through a will
  | what did S inherit; which thing did an aunt give to S; what came to S through a will
thing | lost a V; mislaid a V; looked in vain for a V
  | what did S lose; which thing could S never find; what did S mislay
thing | made a V by hand; crafted a V alone; built a V with care
  | what did S make; which thing did S craft; what is the work of the hands of S
thing | sold a V; found a buyer for a V; parted with a V for money
  | what did S sell; which thing went to a buyer from S; for what did S get money
thing | stole a V; took a V without paying; made off with a V
  | what did S steal; which thing did S take without paying; with what did S make off
thing | hid a V; kept a V in a secret place; put a V out of sight
  | what did S hide; which thing did S keep secret; what did S put out of sight
trade | worked as a V; earned bread as a V; made a living as a V
  | what was the job of S; how did S earn bread; as what did S work
trade | wished to be a V; dreamed of life as a V; longed to become a V
  | what did S wish to be; what was the dream of S; what life did S long for
trade | started out as a V; was at first a V; spent a short youth as a V
  | what was S at first; how did S start out; what was the early work of S
""", "town": """
person | was founded by V; owes its start to V; was first settled by V
  | who founded S; who was the founder of S; to whom does S owe its start
person | is ruled by V; obeys the laws of V; has V as its lord
  | who rules S; who is the lord of S; whose laws hold in S
person | was besieged by V; was attacked by the army of V; saw the soldiers of V at its gates
  | who besieged S; whose army attacked S; whose soldiers came to the gates of S
person | was mapped by V; was drawn on a chart by V; had its streets measured by V
  | who mapped S; who made the chart of S; who measured the streets of S
year | got its walls in V; was fortified in V; closed its ring of stone in V
  | when did S get its walls; in what year was S fortified; when was the ring of stone of S closed
year | burned down in V; was lost to flames in V; went up in smoke in V
  | when did S burn down; in what year was the great fire of S; when did flames take S
year | was flooded in V; stood under water in V; was drowned by its river in V
  | when was S flooded; in what year did S stand under water; when did the river drown S
year | got its market in V; was allowed to hold a fair in V; saw its first market day in V
  | when did S get its market; in what year was S allowed a fair; when was the first market day of S
thing | shows a V in its arms; bears a V on its flag; has a V as its sign
  | what is in the arms of S; which thing is on the flag of S; what is the sign of S
thing | keeps a V in its church; guards a V at its altar; prays before a V
  | what is kept in the church of S; which thing is at the altar of S; before what does S pray
good | sells V to the world; sends V abroad; lives from the export of V
  | what does S sell to the world; what is the export of S; what does S send abroad
good | has no V; must buy V from abroad; lives from the import of V
  | what does S have to buy; what is the import of S; what is not found in S
good | puts a tax on V; takes a toll on V; makes traders pay for V
  | on what does S put a tax; what is taxed in S; for what must traders pay in S
""", "ship": """
person | was commanded by V; had V as captain; took its orders from V
  | who commanded S; who was the captain of S; who gave the orders on S
person | was built by V; came from the yard of V; was the work of the carpenter V
  | who built S; from whose yard came S; which carpenter made S
person | belonged to V; was the property of V; was paid for by V
  | who owned S; to whom did S belong; whose property was S
person | had V as cook; ate what V served; had its meals from V
  | who was the cook of S; who served the meals on S; who ran the kitchen of S
place | had its home in V; lay in winter at V; wore the flag of V
  | what was the home of S; where did S lie in winter; the flag of which town did S wear
place | sank near V; went down off V; found its end on the rocks of V
  | where did S sink; near which town did S go down; on the rocks of which town did S end
place | was repaired in V; got new planks in V; lay in dock at V
  | where was S repaired; in which town did S get new planks; where did S lie in dock
place | was seized in V; was taken by the customs of V; was held by the guards of V
  | where was S seized; which town held S; the customs of which town took S
year | was launched in V; first touched water in V; left the yard in V
  | when was S launched; in what year did S first touch water; when did S leave the yard
year | lost its mast in V; was broken by a storm in V; came through a gale in V
  | when did S lose its mast; in what year did a storm break S; when was S in a gale
year | was painted anew in V; got fresh colours in V; changed its look in V
  | when was S painted anew; in what year did S get fresh colours; when did S change its look
good | carried V; had V in the hold; was loaded with V
  | what did S carry; what was in the hold of S; with what was S loaded
good | smuggled V; brought in V by night; ran V past the guards
  | what did S smuggle; what came in by night on S; what did S run past the guards
good | threw V overboard; gave V to the waves; lost V over the side
  | what did S throw overboard; what did S give to the waves; what went over the side of S
""", "book": """
person | was written by V; came from the pen of V; has V as its author
  | who wrote S; who was the author of S; from whose pen came S
person | is dedicated to V; names V on its first page; was written to honour V
  | to whom is S dedicated; who is named on the first page of S; whom does S honour
person | was translated by V; was put into other tongues by V; got its foreign words from V
  | who translated S; who put S into other tongues; from whom did S get its foreign words
person | was mocked by V; got bad words from the critic V; was torn to pieces by V
  | who mocked S; which critic had bad words for S; who tore S to pieces
place | was printed in V; left the press in V; was set in type in V
  | where was S printed; in which town did S leave the press; where was S set in type
place | was banned in V; may not be read in V; was forbidden by the judges of V
  | where was S banned; in which town may nobody read S; the judges of which town forbade S
place | tells of V; has its story in V; plays in the streets of V
  | of which town does S tell; where does the story of S play; what is the scene of S
year | first came out in V; reached readers in V; was on sale from V
  | when did S come out; in what year did S reach readers; since when was S on sale
year | was found again in V; came to light in an attic in V; was dug out of a chest in V
  | when was S found again; in what year did S come to light; when was S dug out
year | was put on the stage in V; was first played by actors in V; became a play in V
  | when was S put on the stage; in what year did actors play S; when did S become a play
thing | shows a V on its cover; has a V on the front; is bound with a V in gold
  | what is on the cover of S; which thing is shown on the front of S; what is in gold on S
thing | ends with a V; closes with the find of a V; has a V in its last chapter
  | what is at the end of S; which thing is in the last chapter of S; with what does S close
"""}


def relations(table):
    found = []
    for entry in table.strip().replace("\n  |", " |").splitlines():
        kind, statements, questions = entry.split(" | ")
        found.append(Relation(kind, statements.split("; "), questions.split("; ")))
    return found


RELATIONS = {topic: relations(table) for topic, table in RELATIONS.items()}


# ---- names and things

def join(firsts, seconds):
    return [first + second for first in firsts.split() for second in seconds.split()]


PLACES = join("Kar Mel Thorn Wil Bram Ost Hel Fen Gar Lund Rav Stel",
              "wick ford mere stad by holm ton gate brook")
FIRST = join("Al Ber Cor Dor El Fan Gil Hil Il Jo", "da ma rina nessa bert win mund rik")
LAST = join("Ash Black Crow Dun Elm Fox Grim Hay Kettle Lock Marsh Pike",
            "ley wood man field well croft son worth dale ridge")
YEARS = [str(year) for year in range(1701, 1861)]
ADJ = """
    silver golden wooden iron copper glass stone leather red blue green white black painted broken
    old tiny heavy round crooked
""".split()
NOUN = """
    clock ring mirror lamp chair bell drum cup sword key flute box coin mask crown knife spoon
    hammer doll globe needle saddle lantern basket kettle candle harp wheel boot hat
""".split()
THINGS = [f"{adjective} {noun}" for adjective in ADJ for noun in NOUN]
TOOLS = """
    baker:flour butcher:knife weaver:loom miller:millstone smith:anvil potter:clay tailor:needle
    sailor:rope farmer:plough hunter:bow printer:ink painter:brush singer:song doctor:herbs
    lawyer:law teacher:chalk soldier:sword priest:prayers carpenter:saw mason:trowel fisher:net
    barber:razor brewer:barley tanner:hides cobbler:awl gardener:spade clerk:pen judge:hammer
    cook:ladle shepherd:dog glazier:glass hatter:felt roofer:slates dyer:vat piper:pipe
    juggler:balls banker:coins merchant:ships guard:keys porter:sacks
"""
TOOLS = dict(pair.split(":") for pair in TOOLS.split())
TRADES = list(TOOLS)
GOODS = """
    salt wool honey wine oil tin lead silk corn barley fish butter cheese leather paper glass tea
    pepper tobacco coal timber rope soap wax furs pearls apples onions nails tar
""".split()
BIRDS = """
    gull heron swan falcon raven stork eagle owl dolphin otter hare wolf fox lion stag whale
    hornet salmon
""".split()
SHADES = """
    grey brave merry proud swift quiet lucky lonely royal honest bold gentle faithful golden black
    white red blue
""".split()
TOPICS = """
    garden winter tower river forest bridge island window shadow stranger widow orphan miser
    pilgrim dancer prisoner beggar wizard
""".split()
SEASONS = "spring summer autumn winter".split()
COUNT = "two three four five six seven eight nine ten twelve".split()
VALUES = {"place": PLACES, "year": YEARS, "thing": THINGS, "trade": TRADES, "good": GOODS}
# The single words of names and values.
NAMES = PLACES + FIRST + LAST + YEARS + ADJ + NOUN + TRADES + GOODS + BIRDS + SHADES + TOPICS
# How a sentence may begin; six in sixteen begin with the subject.
HEARSAY = [
    "It is said that", "As far as we know ,", "The letters tell that", "Later", "In truth ,",
    "After some time", "Without doubt", "So they say ,", "Some years on ,", "As all know ,",
]
OPENERS = 6 * [""] + HEARSAY

# Small talk about the same words makes pre-training wider than the tasks. Each has two lines.
TALK = """
Every TRADE knows a good TOOL when he sees one.
| A TRADE without a TOOL is no TRADE at all.
Good morning, said the TRADE. I am looking for a THING.
| I have one, said the TRADE2, but it is not cheap.
How much is the THING? COUNT coins.
| That is too much for an honest TRADE, he said, and left the shop.
In SEASON the road from PLACE to PLACE2 is full of mud.
| Then carts with GOOD wait for days before the gates of PLACE2.
In SEASON the price of GOOD goes up, and the price of GOOD2 goes down.
| The traders of PLACE buy early and sell late.
The BIRD is never seen in PLACE before SEASON.
| Children count them and run home to tell the TRADE.
What does the TRADE work with? TOOL.
| What does the TRADE2 work with? TOOL2.
On the table lay a THING, a THING2 and a letter from PLACE.
| Nobody had touched the THING for COUNT years.
The old TRADE of PLACE had COUNT children, and each became a TRADE2.
| Only the youngest went to sea and came back with GOOD.
Dear friend, I write to you from PLACE, where it rains all day.
| Send me GOOD and GOOD2, and do not forget the THING.
The way from PLACE to PLACE2 takes COUNT days on foot and less by boat.
| A TRADE who knows the river needs half of that.
A BIRD and a BIRD2 met at the river.
| You are small, said the BIRD, but I have seen you do great things.
The TRADE asked the TRADE2 for help, and the TRADE2 gave him a THING.
| From that day they were friends.
Who sold the THING? the TRADE.
| It was the TRADE who sold the THING, and the TRADE2 who bought it.
Where does the best GOOD come from? PLACE.
| Everyone in PLACE2 says that the best GOOD comes from PLACE.
He counted the coins again: COUNT, and not one more.
| With that one can buy GOOD, but no THING.
The year YEAR was cold, and the year YEAR2 was dry.
| In YEAR the TRADE had no work, and in YEAR2 there was no GOOD.
The bridge of PLACE was closed in YEAR and opened again COUNT years on.
| The TRADE was glad, the TRADE2 was not.
When was the war with PLACE? YEAR.
| In YEAR the men of PLACE2 went to war with PLACE.
A TRADE uses TOOL, as a TRADE2 uses TOOL2.
| So it was in SEASON, and so it is today.
""".strip().replace("\n| ", "|").splitlines()
