"""Prose written for this package: the kinds of text that Python's own documentation has none of.

Calibration needs activations as varied as those a model meets in use. The help topics are one register; these pieces
add people, places, dates, numbers, dialogue, instructions and questions. All names and events are invented.
"""

PROSE = """\
Elena Marchetti ( 14 March 1871 - 2 November 1946 ) was an Italian botanist and mountaineer. Born in Bergamo to a family
of silk merchants, she studied at the University of Pavia, where she was one of three women in her year. Between 1896 and
1912 she collected more than 4,000 specimens in the southern Alps, and her two-volume flora of the upper valleys remained
the standard work until the 1950s. She was awarded the Royal Society's medal in 1921, but declined to travel to London to
receive it. In her later years she taught at a girls' school in Milan and campaigned for the protection of the wild
orchids that grew above the tree line.

The 1934 coastal hurricane was the costliest storm of that season. It formed on 3 September about 450 miles east of the
islands, strengthened quickly over warm water, and reached its peak on 8 September with winds of 130 mph. After turning
northwest it struck the mainland near the mouth of the river, where a storm surge of 14 feet destroyed the fishing harbor
and most of the lower town. At least 112 people were killed, and damage was estimated at $ 9 million. Reconstruction took
four years; the sea wall built afterwards still stands, and a small museum behind it shows photographs of the flood.

HMS Resolute Star was a light cruiser built for the Royal Navy during the First World War. She was laid down in 1915,
launched in October 1916 and commissioned the following May. Armed with six 6-inch guns and two torpedo tubes, she served
with the 5th Squadron in the North Sea and escorted convoys to Norway. On the night of 17 August 1918 she was hit by a
torpedo that flooded the forward boiler room, but her crew kept her afloat and she was towed to Rosyth. She was placed in
reserve in 1922 and sold for scrap ten years later.

The second album by the band was recorded over eleven days in a converted barn outside Leeds. Most critics praised its
quiet arrangements and the singer's unusual phrasing, though one reviewer complained that "every song seems to end just
when it ought to begin". It entered the chart at number 23, rose to number 7 in its third week, and was certified gold the
next spring. The opening track was released as a single on 12 June and became their first hit in the United States, where
it spent fourteen weeks in the top forty.

In the final, the home team fell behind after nine minutes when a long pass found the winger unmarked. They equalised
before half-time through a header from a corner, and had two goals disallowed in the second half. With the score 1-1 after
extra time the match went to penalties, which the visitors won 4-3. "We were the better side for an hour," the manager
said afterwards, "but you do not win a cup in an hour." It was the club's fourth defeat in a final since 1988.

The grey-crowned warbler is a small songbird found in the mountain forests of the eastern islands, at heights from 600 to
2,200 metres. Adults are about 12 centimetres long and weigh between 8 and 11 grams; the male has a yellow throat and a
dark stripe through the eye. It feeds mainly on beetles, spiders and caterpillars, which it takes from leaves and bark. The
female lays two or three spotted eggs in a cup of moss and roots, and both parents feed the young for about three weeks.
Although its range is small, the species is not considered threatened.

Route 86 begins at a junction with Main Street in the village and runs north through farmland for 7.3 miles. It crosses the
railroad on a steel bridge built in 1927, passes the county fairgrounds, and then climbs into the hills, where it meets the
old turnpike. The road was added to the state system in 1930, paved by 1938, and extended to the border in 1951. On an
average day in 2009 about 3,400 vehicles used its busiest section.

The siege of the fortress lasted from May to October 1643. The garrison of some 800 men, under a Scottish colonel, had food
for three months and little powder. Twice the besiegers brought up heavy guns, and twice heavy rain turned the road behind
them to mud. When an outbreak of fever reached both camps the commanders agreed to a truce, and on 9 October the defenders
marched out with their arms and colours. The king, who had promised relief and sent none, called it a betrayal; modern
historians tend to call it good sense.

The old woman put the kettle on and did not look up. "You are late," she said.
"The bridge was closed. We walked." Tom set the basket on the table and began to take things out of it: bread, two onions,
a piece of cheese wrapped in newspaper. "Did anyone come?"
"Who would come, in this weather?" She laughed, but her hand shook when she poured. Outside the wind had dropped, and for the
first time in three days they could hear the sea.
He waited until she sat down. Then he told her about the letter, slowly, the way he had practised it on the road, and she
listened without a word, turning the ring on her finger.

The city council voted 9 to 4 on Tuesday to close the downtown library for eighteen months while the building is repaired.
Engineers told members last month that the roof could fail in a heavy snowfall. The work will cost an estimated $26.5
million, of which the state has agreed to pay about a third. Residents who spoke at the meeting were divided. "My kids do
their homework there because it is warm and it is quiet," said Denise Albright, who lives two blocks away. "Eighteen months
is half of middle school." A temporary branch is expected to open in the former post office in January.

To make the soup, heat two tablespoons of oil in a large pot over medium heat. Add a chopped onion, two carrots and a stalk
of celery, and cook for eight minutes, stirring now and then, until they are soft. Add three cloves of garlic, a teaspoon of
cumin and a pinch of salt. Pour in six cups of stock and a cup of red lentils, bring to a boil, then lower the heat and
simmer for 25 minutes. Taste it, add lemon juice, and serve with bread. It keeps for four days in the refrigerator.

Question: Why does the moon sometimes look larger near the horizon?
Answer: It does not get larger. If you measure it with a ruler at arm's length it is the same size high in the sky as it is
low down. Near the horizon, however, we see it beside trees and houses, and the brain, which judges size by comparison and
by distance, decides that it must be very big. Photographs taken with the same lens show that the two moons are equal.

Dear Ms. Okafor, thank you for your letter of 6 April. I am sorry that the chair arrived with a damaged leg. We have ordered
a replacement, which should reach you within ten working days, and the driver will take the old one away. You do not need to
pay anything. If the new chair is not what you expected, please call me at the number below between 9 and 5 and I will
arrange a full refund. Yours sincerely, Paul Brandt, Customer Service.

Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar and oxygen. It happens in two
stages. In the first, which needs light, chlorophyll absorbs energy and uses it to split water; the oxygen is released and
the energy is stored in two small molecules. In the second, which does not need light, those molecules drive a cycle of
reactions that builds sugar from carbon dioxide. A leaf in full sun may fix about one gram of carbon per square metre in an
hour. Students often confuse the two stages, so it helps to draw them as two boxes with arrows between them.

Suppose a train leaves the station at 9:00 and travels at 60 kilometres per hour, and a second train leaves the same station
at 10:00 at 90 kilometres per hour. When does the second overtake the first? At 10:00 the first train is 60 kilometres
ahead. The gap closes by 30 kilometres every hour, so it takes 60 / 30 = 2 hours. The answer is 12:00, and both are then
180 kilometres from the station.

The game is set in a flooded city in the year 2190. The player controls Mara, a courier who must carry messages between
rival towers by boat, and can choose at most points whether to fight, bargain or hide. The designers said that they wanted
"a story about debts, not about heroes". Development began in 2008 with a team of nine people and took four years. On its
release the game sold 340,000 copies in its first month and received generally favorable reviews; writers praised the
music and the drawing of the water, but found the final chapter too short and the controls awkward.

The church of St Brannoc stands on a low hill east of the village. The oldest part, the tower, dates from the 12th century;
the nave was rebuilt in 1384 after a fire, and the south aisle added a hundred years later. Inside are a carved font, a
painted screen with figures of eleven apostles (the twelfth was stolen in 1840), and a brass to Sir William Thorne, who died
in 1459. The bells were recast in 1902. It has been a listed building since 1966.

In the episode, the detective returns to her home town for a funeral and finds that nobody will say how her uncle died. It was
written by the show's creator and directed by Alan Pierce, who had worked on the first season. Filming took place in
Vancouver in February, during the coldest week of the winter, and several scenes were moved indoors. The episode was watched
by 8.6 million viewers when it was first broadcast on November 5, making it the third most watched program of the night.

My grandfather kept bees behind the garage, nine white boxes in a row, and every evening in summer he would sit beside them
with his shoes off. He said that you could tell the weather by the sound. I thought he was making it up until the day he
stood, put on his shoes, and walked inside a full hour before the storm. I have kept bees myself for twenty years now and I
still cannot hear it.

Step 1: Turn off the power at the main switch and check that the lamp is dead. Step 2: Remove the two screws that hold the
cover and pull it gently away from the wall. Step 3: Note which wire goes where; a photograph helps. Step 4: Loosen the old
switch, connect the new one in the same way, and press the wires back into the box. Step 5: Replace the cover, restore the
power and test. If the breaker trips, stop and call an electrician.
"""
