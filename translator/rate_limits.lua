-- Token limits, in the HTTP filter chain in front of the router: before a request goes on, what it will use at
-- most is reserved; when its answer ends, it is charged what it used.
--
-- In front of this text stands a local, STAGE (translator/rate_limits.py):
--   "keys": only write the keys' values for the RBAC filters that look at regular expressions;
--   "limits": all else.
-- The policies come with each request, in filter state, as the text of a Lua table: so this filter does not change
-- with them. If it did, Envoy would forget its counts. They are a
--     list of {id, mode = "local" | "global", shadow, denies, targets, keys, rules, regex, bytes_per_token,
--     completion_tokens, max_tokens, slots}; there, 1 stands for true
--     targets list of {route, rule} and {provider}; or nil: all requests
--     keys    list of {header}, {claim}, {constant}, {attribute}
--     rules   list of {name, match = list of {exact}, {prefix} or {}, limits = list of
--             {tokens, unit, seconds, type}}; the last one has no match
--     regex   where the RBAC filter says which rule matched, or nil
--
-- Local counts are gauges of Envoy (handle:stats()), which all worker threads share. A gauge can be added to
-- atomically, but not compared and set; so a count has three of them, and nobody ever sets back what others add
-- to:
--   total   all tokens, ever
--   window  the window that `base` is of
--   base    what `total` was when that window began
-- Who finds another window than the present one sets base to the total that it read *before* it looked at the
-- window, and then the window. A worker adds only after it saw, or set, the present window; so all that race for
-- a new window read the same total, and set the same base. Used is total - base. A request adds what it reserves
-- first, then looks; if that is too much, it takes it away again: two at once may both be refused, never
-- both be let through.
--
-- Counts lie in a fixed number of slots a policy: `owner` is a hash of the key's values. A slot whose windows have
-- all ended is free for another key. Where none is free, keys share the last slot.

-- Nearly all here are calls into Envoy, which LuaJIT does not compile: traces of them would not pay.
jit.off(true, true)

local find, sub, byte, match, floor = string.find, string.sub, string.byte, string.match, math.floor
local band, bxor, tobit, rol = bit.band, bit.bxor, bit.tobit, bit.rol

local PROBES = 8 -- slots that a key can be in
local SHOWN_KEYS = 100 -- distinct values a policy that metrics show; those beyond are "other"
local KNOWN_KEYS = 1000 -- keys a policy and worker that are not looked at anew for each request
local SHOWN_LENGTH = 128 -- bytes of a key's value in logs and metrics

local POLICIES = "llm.ratelimit.policies" -- filter state: the policies
local CHARGES = "llm.ratelimit.charges" -- filter state: what was reserved, for the answer
local METADATA = "llm.rate_limit" -- dynamic metadata for Envoy's ratelimit filter, and what it settles
local MAX_HITS = 1e9 -- more at once Envoy ignores
local UNLIMITED = 2 ^ 32 - 1
local STRING = "envoy.string"
local CHARGE = ";(%d+),(%d+),([^,;]+),(%d+),(%d+),([^;]*)"
local NO_TOKENS = { GET = true, HEAD = true, OPTIONS = true, DELETE = true }

-- --------------------------------------------------------------------------------------------------
-- What is known of a request

local ASKED = { "max_tokens", "max_completion_tokens", "max_output_tokens" }
local WANTED = { model = true, n = true }
for _, name in ipairs(ASKED) do WANTED[name] = true end
local LONGEST_NAME = 6 * 21 -- each letter of a name may be written as \uXXXX

-- The quote that ends the string that begins at i, or nil.
local function string_end(text, i)
  local at = i
  while true do
    at = find(text, '"', at + 1, true)
    if not at then return nil end
    local escapes = at - 1
    while byte(text, escapes) == 92 do escapes = escapes - 1 end
    if (at - 1 - escapes) % 2 == 0 then return at end
  end
end

-- A JSON string without its escapes, so far as letters go: "gp\u0074-4" is the model gpt-4 for a provider, too.
local function unescaped(text)
  if not find(text, "\\", 1, true) then return text end
  text = text:gsub("\\u00([0-7]%x)", function(code) return string.char(tonumber(code, 16)) end)
  return (text:gsub('\\(["\\/])', "%1"))
end

-- The string (in its quotes) or number after the colon at i, or nil.
local function value_at(text, i)
  local from = match(text, "^%s*:%s*()", i)
  if not from then return end
  if byte(text, from) ~= 34 then return match(text, "^%d[%d.eE+-]*", from) end
  local to = string_end(text, from)
  return to and sub(text, from, to)
end

-- Whether any of these members can be there: most requests have none, and to look for that is fast.
local function may_have_members(text, needs_model)
  return find(text, '_tokens"', 1, true) or find(text, '"n"', 1, true) or find(text, "\\u00", 1, true)
    or needs_model and find(text, '"model"', 1, true)
end

-- Members of the JSON object itself, as JSON text. The provider's script checks the body; what is no JSON here has
-- no members.
local function members_of(text, needs_model)
  local found, depth, i = {}, 0, 1
  if not may_have_members(text, needs_model) then return found end
  while true do
    local at = find(text, '["{}%[%]]', i)
    if not at then return found end
    local c = byte(text, at)
    i = at + 1
    if c == 34 then
      local to = string_end(text, at)
      if not to then return found end
      i = to + 1
      if depth == 1 and to - at <= LONGEST_NAME + 1 then
        local name = unescaped(sub(text, at + 1, to - 1))
        if WANTED[name] then found[name] = value_at(text, i) or found[name] end
      end
    elseif c == 123 or c == 91 then
      depth = depth + 1
    else
      depth = depth - 1
    end
  end
end

local function number(text)
  local value = text and tonumber(text)
  return value and value < 2 ^ 32 and value or nil
end

-- The completion tokens that a request may get, in all of its `n` answers.
local function completion_of(policy, members)
  if not policy.max_tokens then return policy.completion_tokens end
  local most
  for _, name in ipairs(ASKED) do
    local value = number(members[name])
    if value and value > (most or -1) then most = value end
  end
  local answers = math.max(1, number(members.n) or 1)
  return math.min(math.ceil((most or policy.completion_tokens) * answers), UNLIMITED)
end

local ATTRIBUTES = {}
function ATTRIBUTES.Client(info) return info:filterState():get("llm.client") end
function ATTRIBUTES.Address(info)
  local address = info:downstreamRemoteAddress()
  return match(address, "^%[(.*)%]:%d+$") or match(address, "^(.*):%d+$") or address
end
function ATTRIBUTES.Provider(info) return info:filterState():get("llm.ratelimit.provider") end
function ATTRIBUTES.Model(_, members)
  local model = members.model and match(members.model, '^"(.+)"$')
  return model and unescaped(model)
end
-- spiffe://cluster.local/ns/shop/sa/cart
function ATTRIBUTES.Workload(info)
  local tls = info:downstreamSslConnection()
  local names = tls and tls:uriSanPeerCertificate()
  local namespace, account = match(names and names[1] or "", "^spiffe://[^/]+/ns/([^/]+)/sa/([^/]+)$")
  return namespace and namespace .. "/" .. account
end

local function claim_of(info, name)
  local token = info:dynamicMetadata():get("envoy.filters.http.jwt_authn")
  local value = token and token.payload and token.payload[name]
  if type(value) == "table" then value = table.concat(value, ",") end
  if type(value) == "number" then value = ("%.14g"):format(value) end
  return value ~= nil and tostring(value) or nil
end

-- The values of a policy's keys; nil if one is missing.
local function values_of(h, policy, members)
  local values, info = {}, nil
  for n, key in ipairs(policy.keys) do
    local value
    if key.header then
      value = h:headers():get(key.header) or nil -- there is no value, not even nil, for a missing one
    elseif key.constant then
      value = key.constant
    else
      info = info or h:streamInfo()
      if key.claim then
        local ok, found = pcall(claim_of, info, key.claim)
        value = ok and found or nil
      else
        value = ATTRIBUTES[key.attribute](info, members)
      end
    end
    if not value or value == "" then return nil end
    values[n] = value
  end
  return values
end

local function matches(rule, values)
  for n, expected in ipairs(rule.match) do
    local value = values[n]
    if expected.exact and value ~= expected.exact then return false end
    if expected.prefix and sub(value, 1, #expected.prefix) ~= expected.prefix then return false end
  end
  return true
end

local function rule_of(h, policy, values)
  local rules = policy.rules
  if values and policy.regex then
    local noted = h:streamInfo():dynamicMetadata():get("envoy.filters.http.rbac")
    local index = noted and tonumber(noted[policy.regex])
    return index and rules[index] or rules[#rules]
  end
  for n = 1, values and #rules - 1 or 0 do
    if matches(rules[n], values) then return rules[n] end
  end
  return rules[#rules]
end

local function is_target(policy, route, rule, provider)
  if not policy.targets then return true end
  for _, target in ipairs(policy.targets) do
    if target.provider then
      if target.provider == provider then return true end
    elseif target.route == route and (not target.rule or target.rule == rule) then
      return true
    end
  end
  return false
end

-- Adds what follows from the policies alone.
local function prepare(policies)
  for index, policy in ipairs(policies) do
    policy.index, policy.counts, policy.gauges, policy.known, policy.known_count = index, {}, {}, {}, 0
    policies.have_targets = policies.have_targets or policy.targets
    for _, key in ipairs(policy.keys) do
      if key.attribute == "Model" then policy.needs_model = true end
    end
    local known = {}
    for place, rule in ipairs(policy.rules) do
      rule.index, rule.metrics = place, {}
      local types = {}
      for _, limit in ipairs(rule.limits) do
        limit.id = limit.type .. ";" .. limit.unit
        limit.label = ";type=" .. limit.type .. ";unit=" .. limit.unit
        limit.counts = not types[limit.type] -- tokens are counted once, however many windows they are in
        types[limit.type] = true
        if not known[limit.id] then
          known[limit.id] = true
          policy.counts[#policy.counts + 1] = limit
        end
      end
    end
  end
  return policies
end

local prepared = setmetatable({}, { __mode = "v" }) -- by their text; running streams may have an older one
local newest

local function all_policies(state)
  local text = state:get(POLICIES)
  local found = prepared[text]
  if not found then
    found = prepare(assert(loadstring("return " .. text))())
    prepared[text], newest = found, found
  end
  return found
end

local function policies_for(info)
  local state, rule = info:filterState(), info:routeName()
  if rule == "allow_any|passthrough" then return end -- translator/capture.py
  local policies = all_policies(state)
  if not policies.have_targets then return policies end
  local route, provider = state:get("llm.ratelimit.route"), state:get("llm.ratelimit.provider")
  local found
  for _, policy in ipairs(policies) do
    if is_target(policy, route, rule, provider) then
      found = found or {}
      found[#found + 1] = policy
    end
  end
  return found
end

-- --------------------------------------------------------------------------------------------------
-- Counts

local function hash(text)
  local one, two = -2128831035, 84696351
  for i = 1, #text do
    local c = byte(text, i)
    one = tobit(rol(bxor(one, c), 5) * 31)
    two = tobit(bxor(rol(two, 7), c) * 17 + 3)
  end
  -- 52 bits, and never 0, which is a free slot
  return band(one, 0xFFFFF) * 2 ^ 32 + (two % 2 ^ 32) + 1
end

-- The gauges of a slot, which live as long as this script; to ask for them by name each time costs a lot.
local function gauges_of(h, policy, slot)
  local found = policy.gauges[slot]
  if not found then
    local stats, prefix = h:stats(), "limit;" .. policy.id .. ";" .. slot .. ";"
    found = { owner = stats:gauge(prefix .. "owner~") }
    for _, limit in ipairs(policy.counts) do
      local count = prefix .. limit.id .. ";"
      found[limit.id] = {
        total = stats:gauge(count .. "total~"),
        base = stats:gauge(count .. "base~"),
        window = stats:gauge(count .. "window~"),
      }
    end
    policy.gauges[slot] = found
  end
  return found
end

local function is_free(policy, of, now)
  for _, limit in ipairs(policy.counts) do
    if of[limit.id].window:value() == floor(now / limit.seconds) then return false end
  end
  return true
end

-- The gauges of a key's slot.
local function slot_of(h, policy, owner, now)
  local free
  for n = 0, PROBES - 1 do
    local slot = (owner + n) % policy.slots
    local of = gauges_of(h, policy, slot)
    local found = of.owner:value()
    if found == owner then return of, slot end
    if not free and (found == 0 or is_free(policy, of, now)) then free = slot end
    if found == 0 then break end -- no key ever went past it
  end
  if free then
    local of = gauges_of(h, policy, free)
    of.owner:set(owner)
    if of.owner:value() == owner then return of, free end -- else another worker took it for another key
  end
  return gauges_of(h, policy, policy.slots), policy.slots
end

-- Begins the present window, if nobody did.
local function enter(of, window)
  if of.window:value() == window then return end
  local before = of.total:value()
  if of.window:value() ~= window then
    of.base:set(before)
    of.window:set(window)
  end
end

-- What is used in the present window then.
local function add(of, window, tokens)
  enter(of, window)
  if tokens > 0 then of.total:add(tokens) end
  return of.total:value() - of.base:value()
end

-- --------------------------------------------------------------------------------------------------
-- Metrics. Envoy takes what follows a semicolon for labels (the bootstrap's stats_tags).

local shown = {}

local function clean(text) return (text:gsub("[;%c\128-\255]", "_")) end

local function shown_key(policy, key)
  local of = shown[policy.id]
  if not of then
    of = { count = 0, keys = {} }
    shown[policy.id] = of
  end
  local label = of.keys[key]
  if label then return label end
  if of.count >= SHOWN_KEYS then return "other" end
  of.count, label = of.count + 1, clean(key)
  of.keys[key] = label
  return label
end

-- A counter or gauge, kept as the gauges above are.
local function metric(h, kind, name, policy, rule, key, more)
  local label = shown_key(policy, key)
  local of, id = rule.metrics[label], more and name .. more or name
  if not of then
    of = {}
    rule.metrics[label] = of
  end
  local found = of[id]
  if not found then
    local full = ("llmx.llmplane_ratelimit_%s;policy=%s;rule=%s;key=%s%s"):format(
      name, policy.id, clean(rule.name), label, more or ""
    )
    local stats = h:stats()
    found = stats[kind](stats, full)
    of[id] = found
  end
  return found
end

local function show_remaining(h, policy, rule, key, limit, used)
  local gauge = metric(h, "gauge", "remaining_tokens", policy, rule, key, limit.label)
  gauge:set(math.max(0, limit.tokens - used))
end

-- --------------------------------------------------------------------------------------------------
-- The request

-- As OpenAI writes it: 59s, 6m0s, 1h0m0s.
local function duration(seconds)
  local minutes, hours = floor(seconds / 60), floor(seconds / 3600)
  if hours > 0 then return ("%dh%dm%ds"):format(hours, minutes % 60, seconds % 60) end
  return minutes > 0 and ("%dm%ds"):format(minutes, seconds % 60) or seconds .. "s"
end

local function until_reset(limit, now) return limit.seconds - now % limit.seconds end

local function refuse(h, status, headers, message, kind, code)
  local body = ('{"error":{"message":"%s","type":"%s","param":null,"code":"%s"}}'):format(
    message:gsub('[%c"\\]', "?"), kind, code
  )
  headers[":status"], headers["content-type"] = status, "application/json"
  h:streamInfo():dynamicMetadata():set("llm", "error", true)
  h:respond(headers, body)
end

local function quota_headers(limit, remaining, now)
  return {
    ["x-ratelimit-limit-tokens"] = ("%d"):format(limit.tokens),
    ["x-ratelimit-remaining-tokens"] = ("%d"):format(math.max(0, remaining)),
    ["x-ratelimit-reset-tokens"] = duration(until_reset(limit, now)),
  }
end

local function note(state, policy, rule, key, remaining, decision)
  state:set("llm.ratelimit.policy", STRING, policy.id)
  state:set("llm.ratelimit.rule", STRING, rule.name)
  state:set("llm.ratelimit.key", STRING, key)
  state:set("llm.ratelimit.remaining", STRING, ("%d"):format(math.max(0, remaining)))
  state:set("llm.ratelimit.decision", STRING, decision)
end

local function take_back(h, taken)
  for _, charge in ipairs(taken) do
    charge.of.total:sub(charge.tokens)
    show_remaining(h, charge.policy, charge.rule, charge.key, charge.limit, charge.used - charge.tokens)
  end
end

local function refuse_limited(h, policy, rule, key, limit, used, wanted, now)
  local remaining, wait = limit.tokens - used, until_reset(limit, now)
  local headers = quota_headers(limit, remaining, now)
  headers["retry-after"] = ("%d"):format(wait)
  metric(h, "counter", "limited_total", policy, rule, key):inc()
  note(h:streamInfo():filterState(), policy, rule, key, remaining, "limited")
  local message = ("Rate limit %s (%s) reached on %s tokens per %s: Limit %d, Used %d, Requested %d. "
    .. "Please try again in %s."):format(
    policy.id, rule.name, limit.type, limit.unit, limit.tokens, used, wanted, duration(wait)
  )
  refuse(h, "429", headers, message, "tokens", "rate_limit_exceeded")
end

-- What is reserved of a limit.
local function wanted_of(limit, prompt, completion)
  local tokens = limit.type == "prompt" and prompt or limit.type == "completion" and completion
    or prompt + completion
  return math.max(1, math.min(tokens, limit.tokens))
end

-- What logs and headers tell of: the limit that is nearest to its end.
local function nearer(nearest, policy, rule, key, limit, remaining)
  local part = remaining / limit.tokens
  if nearest and nearest.part <= part then return nearest end
  return { part = part, policy = policy, rule = rule, key = key, limit = limit, remaining = remaining }
end

local function reserve_globally(h, policy, rule, key, prompt, completion)
  for _, limit in ipairs(rule.limits) do
    h:streamInfo():dynamicMetadata():set(METADATA, policy.id .. "/" .. limit.type .. "/" .. limit.unit, {
      policy = policy.id,
      rule = rule.name,
      key = key,
      type = limit.type,
      limit = { requests_per_unit = limit.tokens, unit = limit.unit:upper() },
      hits = math.min(wanted_of(limit, prompt, completion), MAX_HITS),
    })
  end
end

-- Whether the body is looked at, and for the model.
local function needs_body(policies)
  local body, model = false, false
  for _, policy in ipairs(policies) do
    body, model = body or policy.max_tokens, model or policy.needs_model
  end
  return body or model, model
end

jit.on(hash)

local function escaped(c) return ("%%%02X"):format(byte(c)) end

-- The values as one text, which different values do not share.
local function display(values)
  local parts = {}
  for n, value in ipairs(values) do
    if find(value, "[|,;%%%c]") then value = value:gsub("[|,;%%%c]", escaped) end
    if #value > SHOWN_LENGTH then value = ("%s~%x"):format(sub(value, 1, SHOWN_LENGTH - 16), hash(value)) end
    parts[n] = value
  end
  return #parts > 0 and table.concat(parts, "|") or "*"
end

local MISSING = { key = "-", hash = hash("") } -- a value is missing

-- What is shown of a key, and the hash of its values.
local function known_of(policy, values)
  if not values then return MISSING end
  local text = values[2] and table.concat(values, "\0") or values[1] or ""
  local found = policy.known[text]
  if not found then
    found = { key = display(values), hash = hash(text) }
    if #text > SHOWN_LENGTH then return found end -- clients shall not fill memory
    if policy.known_count == KNOWN_KEYS then policy.known, policy.known_count = {}, 0 end
    policy.known[text], policy.known_count = found, policy.known_count + 1
  end
  return found
end

local function limit_request(h, policies, members, size)
  local now, taken, charges = os.time(), {}, {}
  local enforced, asked_for, tried, shadowed -- the nearest limit of each sort
  for _, policy in ipairs(policies) do
    local values = values_of(h, policy, members)
    local rule, known = rule_of(h, policy, values), known_of(policy, values)
    local key = known.key
    local prompt, completion = math.ceil(size / policy.bytes_per_token), completion_of(policy, members)
    if policy.mode == "global" then
      reserve_globally(h, policy, rule, key, prompt, completion)
      charges[#charges + 1] = ("%d,%d,-,%d,%d,%s"):format(
        policy.index, rule.index, prompt, completion, key
      )
      asked_for = asked_for or nearer(nil, policy, rule, key, rule.limits[1], rule.limits[1].tokens)
    else
      local of, slot = slot_of(h, policy, known.hash, now)
      for _, limit in ipairs(rule.limits) do
        local wanted = wanted_of(limit, prompt, completion)
        local count = of[limit.id]
        local used = add(count, floor(now / limit.seconds), wanted)
        taken[#taken + 1] =
          { of = count, tokens = wanted, used = used, policy = policy, rule = rule, key = key, limit = limit }
        if used > limit.tokens then
          if not policy.shadow then
            take_back(h, taken)
            return refuse_limited(h, policy, rule, key, limit, used - wanted, wanted, now)
          end
          metric(h, "counter", "shadow_limited_total", policy, rule, key):inc()
          shadowed = shadowed or nearer(nil, policy, rule, key, limit, 0)
        end
        show_remaining(h, policy, rule, key, limit, used)
        if policy.shadow then
          tried = nearer(tried, policy, rule, key, limit, limit.tokens - used)
        else
          enforced = nearer(enforced, policy, rule, key, limit, limit.tokens - used)
        end
      end
      charges[#charges + 1] = ("%d,%d,%d,%d,%d,%s"):format(
        policy.index, rule.index, slot, prompt, completion, key
      )
    end
  end
  local state = h:streamInfo():filterState()
  local of = shadowed or enforced or asked_for or tried
  note(state, of.policy, of.rule, of.key, of.remaining, shadowed and "shadow" or "ok")
  of = enforced -- a policy that is tried changes nothing that clients see
  local told = of and ("%d,%d,%d"):format(of.limit.tokens, math.max(0, of.remaining), until_reset(of.limit, now))
  state:set(CHARGES, STRING, now .. ";" .. (told or "-") .. ";" .. table.concat(charges, ";"))
end

local function write_keys(h, policies, members)
  local state = h:streamInfo():filterState()
  for _, policy in ipairs(policies) do
    local values = policy.regex and values_of(h, policy, members)
    for n, value in ipairs(values or {}) do
      state:set(("llm.ratelimit.key.%d.%d"):format(policy.index, n), STRING, value)
    end
  end
end

local function handle(h)
  local headers = h:headers()
  if NO_TOKENS[headers:get(":method")] then return end
  local policies = policies_for(h:streamInfo())
  if not policies then return end
  for _, policy in ipairs(policies) do
    if policy.denies then
      local text = "The LLMTokenRateLimit " .. policy.id .. " of this request is invalid."
      return refuse(h, "403", {}, text, "invalid_request_error", "rate_limit_invalid")
    end
  end
  local members, size = {}, tonumber(headers:get("content-length") or nil)
  local needed, needs_model = needs_body(policies)
  if not size or size > 0 and needed then
    local body = h:body(true) -- waits for all of it; what was read from h before is gone
    size = body:length()
    if size > 0 then members = members_of(body:getBytes(0, size), needs_model) end
  end
  if STAGE == "keys" then return write_keys(h, policies, members) end
  limit_request(h, policies, members, size)
end

-- --------------------------------------------------------------------------------------------------
-- The response

local STATES = {
  prompt = "wasm.asm.llmproxy.request_prompt_tokens",
  completion = "wasm.asm.llmproxy.request_completion_tokens",
  total = "llm.total_tokens",
}

-- What the request was charged, from filter state.
local function charges_of(text, policies)
  local found, now, told = {}, match(text, "^(%d+);([^;]+)")
  for policy, rule, slot, prompt, completion, key in text:gmatch(CHARGE) do
    policy = policies[tonumber(policy)]
    rule = policy.rules[tonumber(rule)]
    for _, limit in ipairs(rule.limits) do
      local reserved = wanted_of(limit, tonumber(prompt), tonumber(completion))
      found[#found + 1] = {
        policy = policy, rule = rule, limit = limit, key = key, slot = tonumber(slot),
        counted = 0, -- by metrics
        reserved = reserved,
        charged = reserved,
      }
    end
  end
  return found, tonumber(now), told
end

local function settle_globally(h, charge, real, began, ended)
  local limit = charge.limit
  local namespace, hits
  if real > charge.charged then
    charge.charged = real
    namespace, hits = METADATA .. ".settle", real - charge.reserved
  elseif ended and real < charge.charged and floor(os.time() / limit.seconds) == floor(began / limit.seconds) then
    namespace, hits = METADATA .. ".release", charge.charged - real
  else
    return
  end
  h:streamInfo():dynamicMetadata():set(namespace, charge.policy.id .. "/" .. limit.type .. "/" .. limit.unit, {
    rule = charge.rule.name,
    key = charge.key,
    limit = { requests_per_unit = UNLIMITED, unit = limit.unit:upper() },
    hits = math.min(hits, MAX_HITS),
  })
end

-- Charges what is used so far; what was reserved too much is given back only in the window it was taken from.
local function settle(h, charge, real, began, ended)
  local policy, rule, limit = charge.policy, charge.rule, charge.limit
  if real > charge.counted then
    if limit.counts then
      local counter = metric(h, "counter", "tokens_total", policy, rule, charge.key, ";type=" .. limit.type)
      counter:add(real - charge.counted)
    end
    charge.counted = real
  end
  if not charge.slot then return settle_globally(h, charge, real, began, ended) end
  if real <= charge.charged and not ended or real == charge.charged then return end
  local of = gauges_of(h, policy, charge.slot)[limit.id]
  local window = floor(os.time() / limit.seconds)
  local used
  if real > charge.charged then
    used = add(of, window, real - charge.charged)
    charge.charged = real
  elseif window == floor(began / limit.seconds) then
    enter(of, window)
    of.total:sub(charge.charged - real)
    used = of.total:value() - of.base:value()
  else
    return
  end
  show_remaining(h, policy, rule, charge.key, limit, used)
end

local function settle_all(h, charges, began, ended)
  local state = h:streamInfo():filterState()
  for _, charge in ipairs(charges) do
    local real = tonumber(state:get(STATES[charge.limit.type]))
    if real then settle(h, charge, real, began, ended) end
  end
end

-- What Envoy's ratelimit filter tells, in OpenAI's names. Returns which part of its limit is left.
local function rename_headers(headers)
  local limit = match(headers:get("x-ratelimit-limit") or "", "^%d+")
  local reset = tonumber(headers:get("x-ratelimit-reset") or nil)
  if not limit or not reset then return end
  local remaining = headers:get("x-ratelimit-remaining") or "0"
  headers:replace("x-ratelimit-limit-tokens", limit)
  headers:replace("x-ratelimit-remaining-tokens", remaining)
  headers:replace("x-ratelimit-reset-tokens", duration(reset))
  for _, name in ipairs({ "limit", "remaining", "reset" }) do headers:remove("x-ratelimit-" .. name) end
  return remaining / limit
end

local function asks_service(charges)
  for _, charge in ipairs(charges) do
    if not charge.slot and not charge.policy.shadow then return true end
  end
  return false
end

-- A service that could not be asked, and failed open, has reserved nothing: what was used is all to be charged.
local function forget_reservations(charges)
  for _, charge in ipairs(charges) do
    if not charge.slot and not charge.policy.shadow then charge.reserved, charge.charged = 0, 0 end
  end
end

local function count_limited(h, charges)
  local told = false
  for _, charge in ipairs(charges) do
    local policy, rule, key = charge.policy, charge.rule, charge.key
    if not charge.slot and charge.limit == rule.limits[1] and not policy.shadow then
      metric(h, "counter", "limited_total", policy, rule, key):inc()
      if not told then
        local remaining = tonumber(h:headers():get("x-ratelimit-remaining-tokens") or nil) or 0
        note(h:streamInfo():filterState(), policy, rule, key, remaining, "limited")
        told = true
      end
    end
  end
end

local function read_response(h)
  local state = h:streamInfo():filterState()
  local text = state:get(CHARGES)
  if not text then return end
  local charges, began, told = charges_of(text, all_policies(state))
  local headers, asks = h:headers(), asks_service(charges)
  if asks and not headers:get("x-ratelimit-limit") then forget_reservations(charges) end
  local part = asks and rename_headers(headers)
  local limit, remaining, reset = match(told, "^(%d+),(%d+),(%d+)$")
  local status = headers:get(":status")
  local is_limited = status == "429" and headers:get("x-envoy-ratelimited")
  if limit and not is_limited and not (part and part <= remaining / limit) then
    headers:replace("x-ratelimit-limit-tokens", limit)
    headers:replace("x-ratelimit-remaining-tokens", remaining)
    headers:replace("x-ratelimit-reset-tokens", duration(tonumber(reset)))
  end
  if is_limited then
    headers:remove("x-envoy-ratelimited")
    count_limited(h, charges)
  end
  local success = sub(status, 1, 1) == "2"
  local before
  for _ in h:bodyChunks() do
    -- If the client or the provider breaks off, nothing is called any more.
    local total = h:streamInfo():filterState():get(STATES.total)
    if total ~= before then
      before = total
      settle_all(h, charges, began, false)
    end
  end
  if h:streamInfo():filterState():get(STATES.total) then
    settle_all(h, charges, began, true)
  elseif not success then
    -- What no provider was asked for may not have been counted either, where a service is to count.
    local asked = (h:streamInfo():filterState():get("llm.operation") or "") ~= ""
    for _, charge in ipairs(charges) do
      if charge.slot or asked then settle(h, charge, 0, began, true) end
    end
  end
end

-- --------------------------------------------------------------------------------------------------

-- Envoy lets a request pass when a script fails.
function envoy_on_request(h)
  local ok, err = pcall(handle, h)
  if not ok then
    h:logErr("rate_limits: " .. tostring(err))
    refuse(h, "500", {}, "The proxy could not count the request.", "server_error", "internal_error")
  end
end

if STAGE == "limits" then
  function envoy_on_response(h)
    local ok, err = pcall(read_response, h)
    if not ok then h:logErr("rate_limits: " .. tostring(err)) end
  end
end
