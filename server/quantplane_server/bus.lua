#!lua name=quantplane

-- The steps on the bus that must be atomic. One shard is:
--   meta    hash: epoch, number (of the last entry), begun (the epoch of what comes),
--           run (the process in which it began), joined (the epoch that goes on after
--           what the database has), appended (bytes, ever), recorded (bytes of these
--           that the database has), position (recorded)
--   stream  entries <epoch>-<number>, numbered without gaps; field "" holds the
--           `appended` of its entry, field "\0" its stamp, field "\1" the entry before
--           it where an epoch begins, every other field is a key with its records
--   latest  hash: key -> its last record
--   feed    hash per feed: session, last (batch here), through (accepted everywhere)

local FEED_TTL_S = 30 * 24 * 3600 -- unheard of for so long, it numbers anew

-- Before its first entry a shard is at 0-0, whatever its epoch.
local function head(meta)
  local state = redis.call('HMGET', meta, 'epoch', 'number')
  if not state[2] or state[2] == '0' then return '0-0' end
  return state[1] .. '-' .. state[2]
end

local run -- how the process names itself, anew at each start

local function process()
  run = run or string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  return run
end

-- Returns the epoch of what is appended now: the time in ms at which the shard was
-- created, or first touched after the process started. One that starts again may have
-- lost the end of what was there, and can't tell; so what was lost never shares a
-- position with what came after it.
local function epoch_of(meta)
  local known = redis.call('HMGET', meta, 'begun', 'epoch', 'run')
  local begun, last = tonumber(known[1] or 0), tonumber(known[2] or 0)
  if begun >= last and known[3] == process() then return known[1] end
  local now = redis.call('TIME')
  local ms = now[1] * 1000 + math.floor(now[2] / 1000)
  local epoch = string.format('%.0f', math.max(ms, begun + 1, last + 1))
  redis.call('HSET', meta, 'begun', epoch, 'run', process())
  for _, count in ipairs{'number', 'appended', 'recorded'} do
    redis.call('HSETNX', meta, count, 0)
  end
  return epoch
end

-- Has an epoch go on after what the database has. It can have more than what is left
-- here, and its feeds send none of that again: who has less must be told.
local function join(meta, position)
  local of, number = string.match(position, '^(%d+)-(%d+)$')
  local state = redis.call('HMGET', meta, 'epoch', 'number', 'appended')
  local ahead = tonumber(of) - tonumber(state[1] or 0)
  if ahead > 0 or ahead == 0 and tonumber(number) > tonumber(state[2]) then
    redis.call('HSET', meta, 'epoch', of, 'number', number)
    redis.call('HSET', meta, 'position', position, 'recorded', state[3])
  end
  redis.call('HSET', meta, 'joined', epoch_of(meta))
end

-- Begins a session of a feed, which ends every earlier one. It is named <epoch>-<count>.
-- KEYS meta feed ARGV the position that the database has; it is needed where the
-- answer without it is nothing -> session, last, through, <epoch>-<number>
local function open_feed(keys, args)
  local meta, feed = keys[1], keys[2]
  local epoch = epoch_of(meta)
  if redis.call('HGET', meta, 'joined') ~= epoch then
    if not args[1] then return {} end
    join(meta, args[1])
    epoch = epoch_of(meta)
  end
  local state = redis.call('HMGET', feed, 'session', 'last', 'through')
  local session = epoch .. '-' .. string.match(state[1] or '0', '%d+$') + 1
  redis.call('HSET', feed, 'session', session)
  redis.call('EXPIRE', feed, FEED_TTL_S)
  local place = epoch .. '-' .. redis.call('HGET', meta, 'number')
  return {session, tonumber(state[2] or 0), tonumber(state[3] or 0), place}
end

-- Tells how a session ended: 'FORGOTTEN' if the bus may have lost what it appended,
-- 'REPLACED' by a newer one, or not: nil. `known` is the one that its feed has.
local function ended(session, known, epoch)
  if not known or string.match(session, '^%d+') ~= epoch then return 'FORGOTTEN' end
  if known ~= session then return 'REPLACED' end
end

-- Keeps that every batch to `through` is on all its shards. KEYS meta feed
-- ARGV session through
local function note_accepted(keys, args)
  if not ended(args[1], redis.call('HGET', keys[2], 'session'), epoch_of(keys[1])) then
    redis.call('HSET', keys[2], 'through', args[2])
  end
end

local STAMP, BEFORE = '\0', '\1'

-- Appends one entry to one shard, once. args[at] is the session, its keys are
-- args[at + 3 ...], three for each of `count`: key, records but the last, the last.
-- The stamp is among them: of these fields it alone is no one's latest.
local function append_entry(keys, args, at, count, terms)
  local meta, stream, latest, feed = unpack(keys)
  local epoch = epoch_of(meta)
  local known = redis.call('HMGET', feed, 'session', 'last')
  local why = ended(args[at], known[1], epoch)
  if why then return {why, ''} end
  local state = redis.call('HMGET', meta, 'epoch', 'number', 'appended', 'recorded')
  if tonumber(args[at + 1]) <= tonumber(known[2] or 0) then
    return {'APPENDED', epoch .. '-' .. state[2]}
  end
  local appended = tonumber(state[3])
  if appended - state[4] >= terms.cap then return {'FULL', ''} end

  local fields, values = {'', ''}, {}
  for i = at + 3, at + 3 * count, 3 do
    local records = args[i + 1] .. args[i + 2]
    appended = appended + #args[i] + #records
    fields[#fields + 1] = args[i]
    fields[#fields + 1] = records
    if args[i] ~= STAMP then
      values[#values + 1] = args[i]
      values[#values + 1] = args[i + 2]
    end
  end
  fields[2] = string.format('%.0f', appended)
  if state[1] ~= epoch then
    fields[#fields + 1] = BEFORE
    fields[#fields + 1] = head(meta)
  end
  local number = string.format('%.0f', state[2] + 1)
  local position = epoch .. '-' .. number
  redis.call('XADD', stream, position, unpack(fields))
  redis.call('HSET', latest, unpack(values))
  redis.call('HSET', meta, 'epoch', epoch, 'number', number, 'appended', fields[2])
  redis.call('HSET', feed, 'last', terms.last, 'through', terms.through)
  redis.call('EXPIRE', feed, FEED_TTL_S)
  return {'APPENDED', position}
end

-- Appends a round to its shards. KEYS per shard: meta stream latest feed
-- ARGV last through cap_bytes, then per shard: session first count, and
-- count times: key, its records but the last, its last record
-- -> per shard: status, position
local function append(keys, args)
  local terms = {last = args[1], through = args[2], cap = tonumber(args[3])}
  local replies, at = {}, 4
  for i = 1, #keys, 4 do
    local count = tonumber(args[at + 2])
    local shard = {keys[i], keys[i + 1], keys[i + 2], keys[i + 3]}
    replies[#replies + 1] = append_entry(shard, args, at, count, terms)
    at = at + 3 + 3 * count
  end
  return replies
end

-- Reads the last records and the position they are as of. KEYS meta latest
-- ARGV keys -> position, records
local function snapshot(keys, args)
  local records = {}
  for i = 1, #args, 4000 do -- unpack takes no more than 8,000
    local page = redis.call('HMGET', keys[2], unpack(args, i, math.min(i + 3999, #args)))
    for j = 1, #page do records[#records + 1] = page[j] end
  end
  return {head(keys[1]), records}
end

-- Notes what the database has, trims, and tells everyone. KEYS per shard: meta stream
-- ARGV channel, then per shard: shard position appended trim_before ('' for nothing)
local function mark_recorded(keys, args)
  local news, at = {}, 2
  for i = 1, #keys, 2 do
    local shard, position, appended, trim_before = unpack(args, at, at + 3)
    local epoch = epoch_of(keys[i])
    local of, number = string.match(position, '^(%d+)-(%d+)$')
    -- An entry of an earlier epoch may be lost since: it says nothing of those here.
    if of == epoch or #redis.call('XRANGE', keys[i + 1], position, position) > 0 then
      redis.call('HSET', keys[i], 'position', position, 'recorded', appended)
      news[#news + 1] = shard .. ' ' .. epoch .. '-' .. number
    end
    if trim_before ~= '' then
      redis.call('XTRIM', keys[i + 1], 'MINID', trim_before)
    end
    at = at + 4
  end
  redis.call('PUBLISH', args[1], table.concat(news, ' '))
end

-- Says up to which number the database has a shard. KEYS meta -> <epoch>-<number>
local function recorded(keys)
  local position = redis.call('HGET', keys[1], 'position')
  return epoch_of(keys[1]) .. '-' .. string.match(position or '0', '%d+$')
end

-- Says how much is not recorded yet, and since when. KEYS meta stream
-- -> appended, recorded, the stamp of the first entry that is not recorded
local function backlog(keys)
  local state = redis.call('HMGET', keys[1], 'appended', 'recorded', 'position')
  local appended, recorded, stamp = state[1] or '0', state[2] or '0', ''
  if appended ~= recorded then
    local after = state[3] and '(' .. state[3] or '-'
    local entry = redis.call('XRANGE', keys[2], after, '+', 'COUNT', 1)[1]
    local fields = entry and entry[2] or {}
    for i = 1, #fields, 2 do
      if fields[i] == STAMP then stamp = fields[i + 1] end
    end
  end
  return {appended, recorded, stamp}
end

redis.register_function('quantplane_append', append)
-- Without memory only appending ends: feeds come, and wait for what frees some.
redis.register_function{
  function_name = 'quantplane_open_feed', callback = open_feed, flags = {'allow-oom'}
}
redis.register_function{
  function_name = 'quantplane_note_accepted', callback = note_accepted,
  flags = {'allow-oom'}
}
redis.register_function{
  function_name = 'quantplane_mark_recorded', callback = mark_recorded,
  flags = {'allow-oom'}
}
redis.register_function{
  function_name = 'quantplane_snapshot', callback = snapshot, flags = {'no-writes'}
}
redis.register_function{
  function_name = 'quantplane_recorded', callback = recorded, flags = {'allow-oom'}
}
redis.register_function{
  function_name = 'quantplane_backlog', callback = backlog, flags = {'no-writes'}
}
