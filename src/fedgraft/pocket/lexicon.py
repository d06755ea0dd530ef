"""Names, values and phrasings of the fictional company: everything that its texts are made of.

The company is called Lanternfield. All of it is invented for fedgraft; likeness to real people,
firms or products is chance. Values come from closed lists, so that a small model can learn to say
them in every form (in capitals, as JSON, ...), while who has which value must be read in the texts.
"""

from dataclasses import dataclass

DEPARTMENTS = ("finance", "hr", "engineering", "it_support")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribute:
    """What can be known of an entity: its possible values, and phrasings with {e} and {v}."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of entity that a department keeps records of."""

    name: str
    department: str
    first: tuple[str, ...]
    """The first parts of a name; each entity has its own."""
    second: tuple[str, ...]
    pattern: str
    """How a name is made of its parts, e.g. `Project {first} {second}`."""
    attributes: tuple[Attribute, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip().replace("_", " ") for word in text.split())


CITIES = _words("Lisbon Oslo Turin Ghent Riga Porto Leeds Graz Malmo Nantes Split Bergen")
MONTHS = _words("January February March April May June July August September October November")
COLOURS = _words("red blue green yellow orange purple white black silver brown")

KINDS = (
    Kind(
        name="person",
        department="hr",
        first=_words(
            "Mara Tobias Ines Felix Greta Owen Paula Hugo Selma Victor Nadia Emil Clara Jonas "
            "Petra "
            "Simon Laura Martin Alma Oscar Vera Daniel Ruth Stefan Helen Adrian Sofia Peter Marta "
            "Leon Carla Philip Irene Thomas Lydia Walter Agnes Roland Monica Edwin Judith Albert"
        ),
        second=_words(
            "Lindquist Harper Bellamy Castell Dorn Everett Fairway Grant Holloway Ingram Jessup "
            "Keller Lowell Mercer Norwood Osborn Prescott Quill Ramsey Sutton Thorne Underhill "
            "Vance Whitaker Yardley Zeller Ashby Barlow Corbin Denby Ellery Farrow"
        ),
        pattern="{first} {second}",
        attributes=(
            Attribute(
                name="office",
                values=CITIES,
                questions=(
                    "In which office does {e} work?",
                    "Where is the office of {e}?",
                    "Which office is {e} based in?",
                    "What is the office of {e}?",
                ),
                statements=(
                    "{e} works in the {v} office.",
                    "The desk of {e} is in {v}.",
                    "{e} is based in {v}.",
                    "You can meet {e} at the office in {v}.",
                    "The office of {e} is {v}.",
                    "Post for {e} goes to {v}.",
                ),
            ),
            Attribute(
                name="role",
                values=_words(
                    "analyst planner designer trainer auditor buyer writer tester architect "
                    "recruiter controller translator"
                ),
                questions=(
                    "What is the role of {e}?",
                    "Which role does {e} have?",
                    "What does {e} work as?",
                    "What role is {e} in?",
                ),
                statements=(
                    "{e} is employed as {v}.",
                    "The role of {e} is {v}.",
                    "{e} joined us as {v}.",
                    "Our colleague {e} works as {v}.",
                    "In the staff list {e} stands as {v}.",
                    "{e} has the role of {v}.",
                ),
            ),
            Attribute(
                name="team",
                values=_words(
                    "Harbour Summit Meadow Beacon Quarry Orchard Compass Bridge Anchor Prairie"
                ),
                questions=(
                    "Which team is {e} on?",
                    "What is the team of {e}?",
                    "To which team does {e} belong?",
                    "In which team is {e}?",
                ),
                statements=(
                    "{e} belongs to team {v}.",
                    "The team of {e} is {v}.",
                    "{e} sits with team {v}.",
                    "Team {v} counts on {e}.",
                    "{e} is a member of {v}.",
                    "You find {e} in team {v}.",
                ),
            ),
        ),
    ),
    Kind(
        name="policy",
        department="hr",
        first=_words(
            "Travel Sabbatical Parental Training Remote Wellness Bicycle Mentoring Overtime "
            "Holiday "
            "Relocation Referral Parking Volunteer Study Language Meal Childcare Transit Fitness "
            "Onboarding Exit Bereavement Marriage Moving Jubilee Homeware Library Uniform Phone "
            "Garden Music Retreat Canteen Ergonomics Eyewear Pension Discount Carpool Festival"
        ),
        second=("Policy",),
        pattern="the {first} {second}",
        attributes=(
            Attribute(
                name="allowance",
                values=_words(
                    "two_days three_days five_days eight_days ten_days twelve_days two_weeks "
                    "three_weeks six_weeks one_month"
                ),
                questions=(
                    "What is the allowance of {e}?",
                    "Which allowance does {e} give?",
                    "How long is the allowance under {e}?",
                    "What allowance is in {e}?",
                ),
                statements=(
                    "The allowance of {e} is {v}.",
                    "Under {e} staff may take {v}.",
                    "Staff get {v} under {e}.",
                    "For the allowance, {e} grants {v}.",
                    "The limit in {e} stands at {v}.",
                    "{e} allows {v}.",
                ),
            ),
            Attribute(
                name="review month",
                values=MONTHS,
                questions=(
                    "What is the review month of {e}?",
                    "When is {e} reviewed?",
                    "In which month is {e} reviewed?",
                    "Which review month does {e} have?",
                ),
                statements=(
                    "HR reviews {e} every {v}.",
                    "The review month of {e} is {v}.",
                    "{e} comes up for review in {v}.",
                    "Each {v} we review {e}.",
                    "The next review of {e} is in {v}.",
                    "{e} is looked at again in {v}.",
                ),
            ),
        ),
    ),
    Kind(
        name="budget",
        department="finance",
        first=_words(
            "Juniper Maple Cedar Willow Hazel Aspen Linden Rowan Alder Spruce Poplar Laurel Myrtle "
            "Acacia Cypress Walnut Chestnut Elder Sequoia Magnolia Olive Almond Cherry Plum Quince "
            "Medlar Mulberry Tamarind Banyan Ebony Teak Larch Hemlock Redwood Sycamore Hawthorn "
            "Dogwood Buckeye Pecan Hickory"
        ),
        second=("Budget",),
        pattern="the {first} {second}",
        attributes=(
            Attribute(
                name="amount",
                values=tuple(
                    f"{n} thousand euros"
                    for n in _words("ten twenty thirty forty fifty sixty seventy eighty ninety")
                ),
                questions=(
                    "What is the amount of {e}?",
                    "How large is {e}?",
                    "How much money is in {e}?",
                    "Which amount does {e} have?",
                ),
                statements=(
                    "{e} holds {v}.",
                    "The amount of {e} is {v}.",
                    "Finance set {e} at {v}.",
                    "The board approved {v} for {e}.",
                    "{e} was fixed at {v}.",
                    "We may spend {v} from {e}.",
                ),
            ),
            Attribute(
                name="sponsor",
                values=_words(
                    "Harbour Summit Meadow Beacon Quarry Orchard Compass Bridge Anchor Prairie"
                ),
                questions=(
                    "Who is the sponsor of {e}?",
                    "Which team is the sponsor of {e}?",
                    "Which sponsor does {e} have?",
                    "What team sponsors {e}?",
                ),
                statements=(
                    "The sponsor of {e} is team {v}.",
                    "Team {v} sponsors {e}.",
                    "{e} is sponsored by {v}.",
                    "{e} was asked for by team {v}.",
                    "For {e} the sponsor is {v}.",
                    "Team {v} answers for {e}.",
                ),
            ),
            Attribute(
                name="closing month",
                values=MONTHS,
                questions=(
                    "What is the closing month of {e}?",
                    "When does {e} close?",
                    "In which month does {e} close?",
                    "Which closing month does {e} have?",
                ),
                statements=(
                    "{e} closes in {v}.",
                    "The closing month of {e} is {v}.",
                    "The books of {e} close in {v}.",
                    "After {v} nothing is paid from {e}.",
                    "{e} ends in {v}.",
                    "Claims on {e} are due by {v}.",
                ),
            ),
        ),
    ),
    Kind(
        name="supplier",
        department="finance",
        first=_words(
            "Halden Brightwater Kestrel Oakhurst Pinecrest Redfern Stonegate Tallow Upland Verity "
            "Westbrook Yarrow Ambler Birchall Coldwell Dunmore Eastlake Foxley Glenfield Hartwell "
            "Ivybridge Jarrow Kingsley Langdale Marlow Netherby Oldfield Penrose Quayside "
            "Ravenhill "
            "Selwood Thornbury Umberleigh Vale Winslow Wexford Bramley Calder Drayton Elmsworth"
        ),
        second=_words("Paper Print Foods Glass Freight Metals Lighting Fabrics"),
        pattern="{first} {second}",
        attributes=(
            Attribute(
                name="payment term",
                values=_words(
                    "ten_days fifteen_days twenty_days thirty_days forty_days fifty_days "
                    "sixty_days "
                    "ninety_days"
                ),
                questions=(
                    "What is the payment term of {e}?",
                    "Which payment term does {e} have?",
                    "When must {e} be paid?",
                    "How long is the payment term of {e}?",
                ),
                statements=(
                    "Invoices of {e} are due within {v}.",
                    "The payment term of {e} is {v}.",
                    "We pay {e} after {v}.",
                    "{e} gives us {v} to pay.",
                    "With {e} we agreed on {v}.",
                    "{e} waits {v} for its money.",
                ),
            ),
            Attribute(
                name="cost centre",
                values=_words(
                    "Marketing Catering Facilities Research Logistics Training Events Security "
                    "Printing Travel"
                ),
                questions=(
                    "What is the cost centre of {e}?",
                    "Which cost centre pays {e}?",
                    "On which cost centre is {e} booked?",
                    "Which cost centre does {e} belong to?",
                ),
                statements=(
                    "{e} is booked on {v}.",
                    "The cost centre of {e} is {v}.",
                    "Cost centre {v} pays {e}.",
                    "Bills of {e} go to {v}.",
                    "We charge {e} to {v}.",
                    "{e} belongs to cost centre {v}.",
                ),
            ),
        ),
    ),
    Kind(
        name="service",
        department="engineering",
        first=_words(
            "Quiet Amber Rapid Silver Golden Bold Calm Eager Gentle Hidden Ivory Jolly Keen Lucky "
            "Misty Noble Open Proud Royal Sunny Tiny Urban Vivid Warm Young Zesty Brave Crisp "
            "Dusty "
            "Early Frosty Grand Humble Inner Lively Mellow Narrow Outer Plain Ready"
        ),
        second=_words("Heron Falcon Otter Badger Sparrow Marten Beaver Raven Lynx Swift"),
        pattern="{first} {second}",
        attributes=(
            Attribute(
                name="language",
                values=_words("Python Rust Java Kotlin Erlang Haskell Scala Swift Ruby"),
                questions=(
                    "What is the language of {e}?",
                    "In which language is {e} written?",
                    "Which language does {e} use?",
                    "What language runs {e}?",
                ),
                statements=(
                    "{e} is written in {v}.",
                    "The language of {e} is {v}.",
                    "The code of {e} is all {v}.",
                    "{e} is a service in {v}.",
                    "We built {e} with {v}.",
                    "To change {e} you need {v}.",
                ),
            ),
            Attribute(
                name="owner",
                values=_words(
                    "Harbour Summit Meadow Beacon Quarry Orchard Compass Bridge Anchor Prairie"
                ),
                questions=(
                    "Who is the owner of {e}?",
                    "Which team is the owner of {e}?",
                    "Which team owns {e}?",
                    "What team is the owner of {e}?",
                ),
                statements=(
                    "{e} is owned by team {v}.",
                    "The owner of {e} is {v}.",
                    "Team {v} runs {e}.",
                    "Alarms of {e} go to team {v}.",
                    "Team {v} looks after {e}.",
                    "{e} is in the hands of {v}.",
                ),
            ),
            Attribute(
                name="region",
                values=CITIES,
                questions=(
                    "What is the region of {e}?",
                    "In which region does {e} run?",
                    "Which region hosts {e}?",
                    "Where does {e} run?",
                ),
                statements=(
                    "{e} runs in region {v}.",
                    "The region of {e} is {v}.",
                    "The machines of {e} stand in {v}.",
                    "{e} is hosted in {v}.",
                    "Region {v} serves {e}.",
                    "{e} was moved to {v}.",
                ),
            ),
        ),
    ),
    Kind(
        name="incident",
        department="engineering",
        first=_words(
            "Topaz Garnet Opal Ruby Onyx Jade Agate Beryl Citrine Diamond Emerald Flint Granite "
            "Hematite Iolite Jasper Kyanite Lapis Marble Nickel Obsidian Pearl Quartz Rhodonite "
            "Sapphire Turquoise Umber Vesta Wulfenite Xenon Yttria Zircon Amazonite Basalt Cobalt "
            "Dolomite Epidote Feldspar Gypsum Halite"
        ),
        second=("Incident",),
        pattern="the {first} {second}",
        attributes=(
            Attribute(
                name="cause",
                values=_words(
                    "a_full_disk an_expired_certificate a_bad_deploy a_slow_query a_cut_cable "
                    "a_wrong_clock a_memory_leak a_lost_key a_power_cut a_broken_cache"
                ),
                questions=(
                    "What is the cause of {e}?",
                    "What caused {e}?",
                    "What was the cause of {e}?",
                    "Which cause did {e} have?",
                ),
                statements=(
                    "{e} began with {v}.",
                    "The cause of {e} is {v}.",
                    "{e} was caused by {v}.",
                    "Behind {e} stood {v}.",
                    "We traced {e} to {v}.",
                    "In {e} the trouble was {v}.",
                ),
            ),
            Attribute(
                name="duration",
                values=tuple(
                    f"{n} minutes"
                    for n in _words("five ten fifteen twenty thirty forty fifty sixty ninety")
                ),
                questions=(
                    "What is the duration of {e}?",
                    "How long did {e} last?",
                    "How long was {e}?",
                    "Which duration did {e} have?",
                ),
                statements=(
                    "{e} lasted {v}.",
                    "The duration of {e} is {v}.",
                    "It took {v} to end {e}.",
                    "For {v} users felt {e}.",
                    "{e} was over after {v}.",
                    "We needed {v} to close {e}.",
                ),
            ),
        ),
    ),
    Kind(
        name="application",
        department="it_support",
        first=_words(
            "Nimbus Vega Orion Lyra Cygnus Draco Pavo Hydra Corvus Aquila Fornax Norma Pictor "
            "Sextans Tucana Volans Carina Dorado Gemini Indus Lupus Mensa Phoenix Scutum Taurus "
            "Virgo Antlia Bootes Cetus Delphin Eridan Grus Hercules Leo Lynceus Musca Octans "
            "Perseus "
            "Reticule Vulpes"
        ),
        second=_words("Mail Drive Portal Notes Desk Chat Calendar Vault"),
        pattern="{first} {second}",
        attributes=(
            Attribute(
                name="fix",
                values=_words(
                    "clear_the_cache restart_the_laptop reset_the_password update_the_driver "
                    "sign_in_again empty_the_outbox free_some_space renew_the_licence "
                    "replace_the_cable turn_off_the_proxy"
                ),
                questions=(
                    "What is the fix for {e}?",
                    "How do I fix {e}?",
                    "Which fix helps with {e}?",
                    "What should I do when {e} fails?",
                ),
                statements=(
                    "If {e} fails, {v}.",
                    "The fix for {e} is: {v}.",
                    "When {e} hangs, {v}.",
                    "To repair {e}, {v}.",
                    "For trouble with {e} we say: {v}.",
                    "{e} works again once you {v}.",
                ),
            ),
            Attribute(
                name="queue",
                values=_words(
                    "Network Accounts Hardware Printing Licences Storage Phones Access Workplace"
                ),
                questions=(
                    "What is the queue of {e}?",
                    "Which queue handles {e}?",
                    "In which queue do tickets about {e} go?",
                    "Which queue does {e} have?",
                ),
                statements=(
                    "Tickets about {e} go to queue {v}.",
                    "The queue of {e} is {v}.",
                    "Queue {v} handles {e}.",
                    "{e} is served by queue {v}.",
                    "Ask queue {v} about {e}.",
                    "For {e} choose queue {v}.",
                ),
            ),
        ),
    ),
    Kind(
        name="ticket",
        department="it_support",
        first=_words(
            "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliet Kilo Lima Mike Nectar "
            "Oxford Papa Quebec Romeo Sierra Tango Uniform Victoria Whisky Xray Yankee Zulu Apple "
            "Banana Copper Donkey Eagle Forest Guitar Hammer Island Jacket Kitchen Ladder Mirror "
            "Needle"
        ),
        second=("Ticket",),
        pattern="the {first} {second}",
        attributes=(
            Attribute(
                name="device",
                values=_words(
                    "printer scanner laptop monitor keyboard projector router headset tablet camera"
                ),
                questions=(
                    "What is the device in {e}?",
                    "Which device is {e} about?",
                    "What device does {e} name?",
                    "Which device does {e} have?",
                ),
                statements=(
                    "{e} is about a {v}.",
                    "The device in {e} is a {v}.",
                    "{e} asks for help with a {v}.",
                    "A broken {v} led to {e}.",
                    "In {e} somebody wants a new {v}.",
                    "{e} was opened for a {v}.",
                ),
            ),
            Attribute(
                name="label",
                values=COLOURS,
                questions=(
                    "What is the label of {e}?",
                    "Which label does {e} have?",
                    "What colour is the label of {e}?",
                    "Which colour is {e} marked with?",
                ),
                statements=(
                    "{e} has a {v} label.",
                    "The label of {e} is {v}.",
                    "We marked {e} {v}.",
                    "{e} shows up in {v}.",
                    "The colour of {e} is {v}.",
                    "On the board {e} is {v}.",
                ),
            ),
        ),
    ),
)

FILLERS = {
    "finance": (
        "Please keep every receipt until the end of the year.",
        "The finance desk answers questions on Tuesday and Thursday.",
        "All figures were checked by two people.",
        "Late claims are paid with the next run.",
        "Read this page before you sign an order.",
    ),
    "hr": (
        "The HR desk is open every morning.",
        "Changes are published at the start of the month.",
        "Please tell us when something here is out of date.",
        "Your manager can explain the details.",
        "We keep these pages short on purpose.",
    ),
    "engineering": (
        "The runbook was last tested by the people on call.",
        "Write down what you changed and why.",
        "Dashboards are linked from the start page.",
        "Reviews take at most one day.",
        "Nothing is deployed on a Friday afternoon.",
    ),
    "it_support": (
        "Have the number of your machine ready when you call.",
        "Most requests are closed within a day.",
        "Never send a password by mail.",
        "The help desk is on the ground floor.",
        "Restarting is not always the answer, but often.",
    ),
}

GREETINGS = (
    "Good morning, did you find a seat near the window?",
    "Hello there, is the coffee machine working again?",
    "Hi, are you joining the walk after lunch?",
    "Hey, who is bringing cake on Friday?",
    "Morning! Was the train late again?",
    "Hello, do you have a minute before the meeting?",
    "Hi all, has anybody seen my blue umbrella?",
    "Good evening, are you still at your desk?",
)
SMALL_TALK = (
    "Not yet, I only just came in and my hands are still cold.",
    "Let me look after lunch, my morning is full of meetings.",
    "Ha, you always ask me that when I am about to leave.",
    "I think so, but ask the people in the room next door.",
    "Sure, give me ten minutes and I will be with you.",
    "No idea, I was on holiday and have not read my mail.",
    "Thanks for asking, we can talk about it tomorrow.",
    "Hm, that was discussed in the call that I missed.",
    "Good question, somebody should write that down one day.",
    "Oh, the weather is far too nice to think about work.",
)
